"""What follows from a config, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qrhash

ONE = qrhash.FullTable(100)
TWO = qrhash.QuotientRemainder(100, 4)  # 25 + 4 rows
THREE = qrhash.MixedRadix(24, (2, 3, 4))


@pytest.mark.parametrize(
    ("partition", "features", "operation", "options", "shapes", "projection", "num_params"),
    [
        (ONE, 8, "mult", {}, [(100, 8)], None, 800),
        (ONE, 8, "concat", {}, [(100, 8)], None, 800),
        (ONE, 8, "project", {}, [(100, 2)], (2, 8), 200 + 16 + 8),
        (TWO, 8, "add", {}, [(25, 8), (4, 8)], None, 232),
        (TWO, 8, "concat", {}, [(25, 4), (4, 4)], None, 116),
        (TWO, 9, "concat", {}, [(25, 5), (4, 4)], None, 141),
        (TWO, 9, "concat", {"widths": (7, 2)}, [(25, 7), (4, 2)], None, 183),
        (TWO, 8, "project", {}, [(25, 2), (4, 2)], (6, 8), 58 + 48 + 8),
        (TWO, 8, "project", {"use_bias": False}, [(25, 2), (4, 2)], (6, 8), 58 + 48),
        (TWO, 3, "project", {}, [(25, 1), (4, 1)], (3, 3), 29 + 9 + 3),
        (TWO, 8, "project", {"widths": (4, 4)}, [(25, 4), (4, 4)], (12, 8), 116 + 96 + 8),
        (THREE, 8, "mult", {}, [(2, 8), (3, 8), (4, 8)], None, 72),
        (THREE, 8, "concat", {}, [(2, 3), (3, 3), (4, 2)], None, 23),
        (THREE, 8, "project", {}, [(2, 2), (3, 2), (4, 2)], (8, 8), 18 + 64 + 8),
    ],
)
def test_shapes_and_counts(partition, features, operation, options, shapes, projection, num_params):
    cfg = qrhash.EmbedConfig(partition, features, operation, **options)
    assert cfg.table_shapes == tuple(shapes)
    assert cfg.num_tables == len(shapes)
    assert cfg.projection_shape == projection
    assert cfg.num_params == num_params


def test_defaults():
    cfg = qrhash.EmbedConfig(TWO, 8)
    assert (cfg.operation, cfg.id_policy, cfg.dtype) == ("mult", "nan", None)
    assert cfg.param_dtype == jnp.float32
    assert cfg.use_bias
    assert cfg.logical_axes is None
    assert cfg.padding_id is None


def test_a_config_is_a_frozen_hashable_value():
    make = lambda **options: qrhash.EmbedConfig(TWO, 8, param_dtype=jnp.bfloat16, **options)  # noqa: E731
    cfg = make(widths=[8, 8], embedding_init=nn.initializers.ones)
    same = make(widths=(8, 8), embedding_init=nn.initializers.ones)
    assert cfg == same
    assert hash(cfg) == hash(same)
    assert cfg != make()
    assert make(dtype="float32") == make(dtype=jnp.float32) == make(dtype=np.dtype("float32"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.features = 3
    shapes = jax.jit(lambda c: jnp.zeros(c.table_shapes[0]), static_argnums=0)
    assert shapes(cfg).shape == shapes(same).shape == (25, 8)
    assert shapes._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partition": 100}, ["partition", "100"]),
        ({"features": 0}, ["features", "positive", "0"]),
        ({"features": 2.5}, ["features", "integer", "2.5"]),
        ({"operation": "sum"}, ["operation", "'sum'", "project"]),
        ({"operation": None}, ["operation", "None"]),
        ({"id_policy": "ignore"}, ["id_policy", "'ignore'", "wrap"]),
        ({"operation": "concat", "features": 1}, ["features", "1", "2"]),
        ({"operation": "concat", "widths": (4, 5)}, ["widths", "8", "(4, 5)"]),
        ({"operation": "concat", "widths": (8, 0)}, ["widths", "0"]),
        ({"operation": "concat", "widths": (8,)}, ["widths", "2", "(8,)"]),
        ({"operation": "concat", "widths": 8}, ["widths", "8"]),
        ({"operation": "mult", "widths": (8, 4)}, ["widths", "8", "(8, 4)"]),
        ({"operation": "add", "widths": (4, 4)}, ["widths", "8", "(4, 4)"]),
        ({"operation": "project", "widths": (2, 3)}, ["widths", "(2, 3)"]),
        ({"dtype": jnp.int32}, ["dtype", "int32"]),
        ({"param_dtype": "no such"}, ["param_dtype", "no such"]),
        ({"param_dtype": None}, ["param_dtype", "None"]),
        ({"embedding_init": 0.1}, ["embedding_init", "0.1"]),
        ({"embedding_init": (nn.initializers.ones,)}, ["embedding_init", "2", "1"]),
        ({"init_stddev": 0.0}, ["init_stddev", "0.0"]),
        ({"init_stddev": float("nan")}, ["init_stddev", "nan"]),
        ({"init_stddev": 1.0, "embedding_init": nn.initializers.ones}, ["init_stddev", "1.0"]),
        ({"logical_axes": ("rows",)}, ["logical_axes", "rows"]),
        ({"large_table_rows": 0}, ["large_table_rows", "0"]),
    ],
)
def test_bad_arguments_are_refused_with_argument_rule_and_value(change, words):
    arguments = {"partition": TWO, "features": 8, **change}
    with pytest.raises(ValueError, match=words[0]) as error:
        qrhash.EmbedConfig(**arguments)
    assert all(word in str(error.value) for word in words), error.value
