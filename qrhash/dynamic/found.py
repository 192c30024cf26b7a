"""`Found`: keys with their rows, as look-ups take them, and the two look-ups that each of them is.

A key has its own row, or a compressed vector. Both are looked up for all keys, as ids of ordinary
features: own rows with no row where a key has none, compressed vectors in bags that are empty where
it has one. Nothing is read for these, no gradient is sent anywhere, and the vector is the sum. So
it is with the tables of one `DynamicConfig`, and with those of a collection.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.bags import Bag
from qrhash.batches import everywhere
from qrhash.dynamic.config import REFUSED, DynamicConfig
from qrhash.dynamic.index import Rows
from qrhash.keys import Keys
from qrhash.parts import PartIds
from qrhash.pooling import divided, pool
from qrhash.types import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("keys", "rows", "meant"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)
class Found(PartIds):
    """Keys of a batch with their rows: what look-ups take.

    Attributes:
      keys: `Keys` [*shape], or a `qrhash.Bag` of n keys.
      rows: their `Rows`; of a bag [n].
      meant: which of the keys are meant, bool; None: all. The others have vectors of zeros.
    """

    keys: Any
    rows: Rows
    meant: Any = None

    @property
    def flat_keys(self) -> Keys:
        """The keys [n]."""
        flat = keys_of(self.keys).reshape(-1)
        return Keys(jnp.asarray(flat.hi), jnp.asarray(flat.lo))

    def new_rows(self, config: DynamicConfig) -> jax.Array:
        """The rows that keys have just got, int32 [n]: at their first places; else the capacity."""
        rows = jnp.where(self.rows.is_new, self.rows.rows, config.capacity).reshape(-1)
        made: jax.Array = everywhere(rows, config.layout)
        return made

    def is_pooled_last(self, config: DynamicConfig) -> bool:
        """Whether the vectors of bags are not sums of those of the parts."""
        constant = config.refused is None and config.refused_value
        return isinstance(self.keys, Bag) and bool(config.combiner == "max" or constant)

    def by_part(self, config: DynamicConfig) -> Mapping[str, Array | Bag]:
        """What is looked up in the own rows, and in the compressed tables if there are any."""
        rows, has_row = self.rows.rows, self.rows.rows < config.capacity
        if isinstance(self.keys, Bag) and not self.is_pooled_last(config):
            own = {"": _some_of(self.keys, has_row, rows)}
            if config.refused is None:
                return own
            return own | {REFUSED: _some_of(self.keys, ~has_row, self.keys.ids)}
        if config.refused is None:
            return {"": rows}
        # One place for each key, which is empty where it has a row.
        keys = keys_of(self.keys).reshape(*rows.shape, 1)
        is_refused = self._is_refused(config)[..., None]
        return {"": rows, REFUSED: Bag.from_padded(keys, mask=is_refused)}

    def vectors(self, of_parts: Mapping[str, jax.Array], config: DynamicConfig) -> jax.Array:
        """The vectors [*shape, features], of those of own rows and of the compressed ones."""
        sums = of_parts[""]
        if config.refused is not None:
            sums = sums + of_parts[REFUSED].astype(sums.dtype)
        elif not isinstance(self.keys, Bag) or self.is_pooled_last(config):
            is_refused = self._is_refused(config)[..., None]
            sums = jnp.where(is_refused, config.refused_value, sums).astype(sums.dtype)
        if not isinstance(self.keys, Bag):
            return sums
        shape = (*self.keys.shape, config.features)
        if self.is_pooled_last(config):
            sums, bag = everywhere((sums, self.keys.without_ids()), config.layout)
            return pool(sums, bag, config.combiner).reshape(shape)
        flat = sums.reshape(self.keys.num_bags, config.features)
        return divided(flat, self.keys, config.combiner).reshape(shape)

    def _is_refused(self, config: DynamicConfig) -> jax.Array:
        """Which keys are meant and have no row."""
        is_refused = self.rows.rows == config.capacity
        return is_refused if self.meant is None else is_refused & self.meant


def keys_of(keys: Keys | Bag) -> Keys:
    """The keys [*shape], or those in the places of bags [n]."""
    found: Keys = keys.ids if isinstance(keys, Bag) else keys
    return found


def as_keys(keys: Any, where: Array | None) -> tuple[Keys | Bag, Any]:
    """Keys as they were given, and which of them are meant; None: all."""
    if not isinstance(keys, Bag):
        return Keys.of(keys), where
    if where is not None:
        raise ValueError("where must be left out with a Bag, whose segments say the same.")
    return dataclasses.replace(keys, ids=Keys.of(keys.ids)), jnp.asarray(keys.in_bag)


def check_found(found: Any) -> None:
    """Raises a ValueError unless it is what `assign` or `find` gives."""
    if not isinstance(found, Found):
        raise ValueError(
            "found must be keys with their rows, as qrhash.dynamic.assign or find gives them, got "
            f"{type(found).__name__}."
        )


def _some_of(bag: Bag, where: jax.Array, ids: Any) -> Bag:
    """The bags with some of their places, and these ids."""
    segments = jnp.where(where, bag.segments, bag.num_bags)
    return dataclasses.replace(bag, ids=ids, segments=segments)
