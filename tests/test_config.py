"""What follows from a config, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash import EmbedConfig

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
        (ONE, 8, "path", {}, [(100, 8)], None, 800),
        (TWO, 8, "path", {}, [(25, 2), (4, 24)], None, 50 + 96),
        (TWO, 8, "path", {"widths": (40, 4)}, [(25, 40), (4, 4)], None, 1000 + 16),
        (THREE, 8, "path", {}, [(2, 6), (3, 24), (4, 2)], None, 12 + 72 + 8),
        (TWO, 8, "features", {}, [(25, 8), (4, 8)], None, 232),
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
        ({"operation": "path", "widths": (2, 23)}, ["widths", "2 + 1", "23", "(2, 23)"]),
        ({"operation": "path", "widths": (2, 21)}, ["widths", "features=8", "7 outputs"]),
        ({"operation": "path", "widths": (8, 8)}, ["widths", "8 + 1", "(8, 8)"]),
        ({"operation": "features", "widths": (8, 4)}, ["widths", "features=8", "(8, 4)"]),
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


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["add", "mult", "concat", "project", "path", "features"])
@given(
    n=st.sampled_from([1, 2, 7, 100, 999, 10_000, 1_000_003]),
    features=st.sampled_from([2, 3, 16, 33]),
    compression=st.floats(1, 100),
)
def test_a_budget_is_kept_and_used_up(operation, n, features, compression):
    """Everything counted; one more row, or a width more, would not fit."""
    budget = int(n * features / compression)
    try:
        cfg = EmbedConfig.fit(n, features, operation, compression=compression)
    except ValueError as error:
        assert "too small" in str(error) or "at least one per table" in str(error)  # noqa: PT017
        assert n < 1_000_000
        return
    assert cfg.num_params <= budget
    assert cfg.partition.is_complementary
    assert (cfg.num_embeddings, cfg.features) == (n, features)
    if n >= 1_000_000 and features >= 16 and budget < n * features:
        assert cfg.num_params > (0.98 if operation == "project" else 0.999) * budget - features


def test_a_budget_in_bytes_and_in_parameters():
    by_bytes = EmbedConfig.fit(10_000, 16, num_bytes=40_000, param_dtype="bfloat16")
    by_params = EmbedConfig.fit(10_000, 16, num_params=20_000, param_dtype="bfloat16")
    assert by_bytes == by_params
    assert by_bytes.num_params * 2 <= 40_000
    alone = EmbedConfig.fit(10_000, 16, "project", compression=1)
    assert (alone.partition, alone.operation) == (qrhash.FullTable(10_000), "mult")


def test_project_spends_a_budget_on_many_narrow_rows():
    cfg = EmbedConfig.fit(1_000_000, 16, "project", compression=8)
    assert cfg.widths == (2, 2)
    assert max(cfg.partition.num_rows) > 999_000
    one = EmbedConfig.fit(1_000_000, 16, "project", num_params=3 * 1_000_016 + 16)
    assert (one.partition, one.widths) == (qrhash.FullTable(1_000_000), (3,))


def test_path_spends_a_budget_on_many_narrow_rows_and_few_maps():
    cfg = EmbedConfig.fit(1_000_000, 16, "path", compression=8)
    assert cfg.widths == (3 * 16, 2)
    assert cfg.partition.num_rows == (2, 999_952)


def test_options_and_families_of_a_budget():
    def family(n, rows):
        return qrhash.MixedRadix(n, (rows, -(-n // rows)))

    cfg = EmbedConfig.fit(
        10_000, 16, "concat", compression=4, family=family, widths=(12, 4), id_policy="zero"
    )
    assert isinstance(cfg.partition, qrhash.MixedRadix)
    assert (cfg.widths, cfg.id_policy) == ((12, 4), "zero")
    assert 39_900 < cfg.num_params <= 40_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Exactly one budget.*got none"),
        ({"compression": 4, "num_bytes": 4}, "Exactly one budget.*compression=4, num_bytes=4"),
        ({"compression": 0.5}, "compression must be a number of at least 1, got 0.5"),
        ({"compression": float("nan")}, "compression"),
        ({"compression": "4"}, "compression"),
        ({"num_bytes": 0}, "num_bytes"),
        ({"num_params": 1.5}, "num_params"),
        ({"num_params": 10}, "too small.*smallest tables of QuotientRemainder take [0-9,]+"),
    ],
)
def test_budgets_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        EmbedConfig.fit(1000, 16, **options)
