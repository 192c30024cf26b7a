"""Tables that grow: a row for every key that has earned one, while keys come and go.

An id of production data is a 64-bit key that nobody has numbered, most of them are met once, and
new ones come every day. A dynamic embedding gives a row of its own to each key that has been met
often enough, takes rows back from those that are met no more, and has a meaningful vector for all
others: the compressed one, from a few small tables.

>>> import jax
>>> import qrhash
>>> compressed = qrhash.EmbedConfig(qrhash.KeyDigits(32, num_tables=2), features=8)
>>> config = DynamicConfig(1000, 8, admission=ExactCount(2, 1000), refused=compressed)
>>> params, state = init(jax.random.key(0), config), init_state(config)
>>> keys = qrhash.Keys.of(["shoes", "hats", "shoes"])
>>> state, found = assign(state, keys, config, step=0)
>>> params, new = start_rows(params, found, config)
>>> found.rows.rows.tolist(), lookup(params, found, config).shape
([0, 1000, 0], (3, 8))
"""

from qrhash.delta_files import Delta, load_delta, save_delta
from qrhash.dynamic.admission import AdmitByChance, ExactCount, SketchCount
from qrhash.dynamic.cached import cached
from qrhash.dynamic.collections import (
    assign_all,
    evict_all,
    find_all,
    init_states,
    parameters_in,
    start_all,
)
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.deltas import (
    Published,
    Served,
    apply_delta,
    delta_since,
    nothing_published,
    nothing_served,
)
from qrhash.dynamic.embedding import (
    Parameters,
    State,
    assign,
    evict,
    find,
    init,
    init_state,
    large,
    lookup,
    start_rows,
)
from qrhash.dynamic.eviction import Eviction, LeastUsed, SmallNorm, StepsSinceUse
from qrhash.dynamic.found import Found
from qrhash.dynamic.growth import grow, grow_all
from qrhash.dynamic.index import KeyIndex, Rows
from qrhash.dynamic.newcomers import Admission, AdmitAll
from qrhash.dynamic.resharding import reshard
from qrhash.dynamic.store import FileStore, MemoryStore, Store
from qrhash.dynamic.tiers import Fetched, Tiered

__all__ = [
    "Admission",
    "AdmitAll",
    "AdmitByChance",
    "Delta",
    "DynamicConfig",
    "Eviction",
    "ExactCount",
    "Fetched",
    "FileStore",
    "Found",
    "KeyIndex",
    "LeastUsed",
    "MemoryStore",
    "Parameters",
    "Published",
    "Rows",
    "Served",
    "SketchCount",
    "SmallNorm",
    "State",
    "StepsSinceUse",
    "Store",
    "Tiered",
    "apply_delta",
    "assign",
    "assign_all",
    "cached",
    "delta_since",
    "evict",
    "evict_all",
    "find",
    "find_all",
    "grow",
    "grow_all",
    "init",
    "init_state",
    "init_states",
    "large",
    "load_delta",
    "lookup",
    "nothing_published",
    "nothing_served",
    "parameters_in",
    "reshard",
    "save_delta",
    "start_all",
    "start_rows",
]
