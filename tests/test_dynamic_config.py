"""`DynamicConfig` as JSON has it."""

import json

import jax
import jax.numpy as jnp
import pytest

from qrhash import EmbedConfig, KeyDigits, MultiHash
from qrhash.dynamic import (
    AdmitAll,
    AdmitByChance,
    DynamicConfig,
    ExactCount,
    LeastUsed,
    SketchCount,
    SmallNorm,
    StepsSinceUse,
    init_state,
)
from qrhash.dynamic.index import shard_bytes
from support.meshes import make_layout

CONFIGS = [
    DynamicConfig(100, 8),
    DynamicConfig(100, 8, admission=AdmitAll(), eviction=StepsSinceUse(3), refused_value=0.5),
    DynamicConfig(100, 8, admission=ExactCount(3, 50), eviction=SmallNorm(1e-3), init_stddev=0.1),
    DynamicConfig(
        *(100, 8),
        admission=SketchCount(3, 1000, halve_every=7),
        eviction=LeastUsed(50, by="step"),
        refused=EmbedConfig(MultiHash((50, 51, 52)), 8, "project"),
        param_dtype=jnp.bfloat16,
        dtype=jnp.float32,
        combiner="max",
        seed=5,
        large_table_rows=10,
    ),
    DynamicConfig(100, 8, admission=AdmitByChance(0.25)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_and_back(config):
    assert DynamicConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_and_back_on_a_mesh():
    layout = make_layout((8,), ("model",))
    config = DynamicConfig(
        16, 8, refused=EmbedConfig(KeyDigits(6, num_tables=2), 8, layout=layout), layout=layout
    )
    assert DynamicConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_functions_are_given_beside_json():
    init = jax.nn.initializers.ones
    config = DynamicConfig(10, 4, embedding_init=init)
    with pytest.raises(ValueError, match="embedding_init must be None in JSON"):
        config.to_dict()
    values = DynamicConfig(10, 4).to_dict()
    assert DynamicConfig.from_dict(values, embedding_init=init) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"admission": {"type": "Everybody"}}, "type must be one of .*ExactCount.*'Everybody'"),
        ({"admission": {"type": "ExactCount"}}, "ExactCount needs 'threshold'"),
        ({"admission": 3}, "admission must be a mapping"),
        ({"admission": {"type": "StepsSinceUse", "steps": 3}}, "type must be one of"),
        ({"eviction": {"type": "StepsSinceUse", "days": 3}}, "StepsSinceUse has steps, got 'days'"),
        ({"rows": 3}, "DynamicConfig has .*, got 'rows'"),
    ],
)
def test_values_that_make_no_config_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DynamicConfig.from_dict(DynamicConfig(10, 4).to_dict() | change)


ADMISSIONS = [AdmitAll(), ExactCount(2, 50), SketchCount(3, 999), SketchCount(300, 999)]


@pytest.mark.parametrize("admission", [*ADMISSIONS, AdmitByChance(0.5)], ids=repr)
@pytest.mark.parametrize("capacity", [1, 64, 65, 1000])
@pytest.mark.parametrize("num_shards", [None, 8])
def test_bytes_of_an_index_are_those_of_its_arrays(admission, capacity, num_shards):
    layout = num_shards and make_layout((num_shards,), ("model",))
    config = DynamicConfig(capacity, 8, admission=admission, layout=layout)
    arrays = jax.tree.leaves(jax.eval_shape(lambda: init_state(config)))
    taken = sum(array.size * array.dtype.itemsize for array in arrays)
    assert (num_shards or 1) * shard_bytes(capacity, admission, num_shards) == taken
