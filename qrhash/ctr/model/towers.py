"""Two towers for retrieval, in Flax NNX.

One makes a vector of a query, the other one of an item: the vectors of their columns, and the
numbers of a query, go through an MLP. The score of a query and an item is the dot product of the
two, so that the items' vectors can be made once, and searched for any query.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qrhash import Keys
from qrhash.ctr.data.pipeline import Padded
from qrhash.ctr.model.growing import Counts, GrowingColumns
from qrhash.ctr.model.models import MLP, Embeddings, takes_keys
from qrhash.ctr.model.room import ColumnConfig
from qrhash.ctr.options import widths
from qrhash.ctr.settings import Settings
from qrhash.dynamic import Found
from qrhash.keys import cross, scramble


@dataclass(frozen=True)
class TowerColumns:
    """Where the columns of a tower are among those of a batch.

    Attributes:
      ids: of those that have ids, which of the batch's.
      keys: of those that have keys, as well.
      lists: of those of lists.
    """

    ids: tuple[int, ...]
    keys: tuple[int, ...]
    lists: tuple[int, ...]

    @classmethod
    def of(
        cls, configs: Mapping[str, ColumnConfig], lists: Collection[str], names: Collection[str]
    ) -> "TowerColumns":
        """Those of some names, among the columns of a model, in order, some of them of lists."""
        single = [name for name in configs if name not in lists]
        with_keys = [name for name in single if takes_keys(configs[name])]
        with_ids = [name for name in single if name not in with_keys]
        of_lists = [name for name in configs if name in lists]
        ids, keys, bags = (
            tuple(j for j, name in enumerate(every) if name in names)
            for every in (with_ids, with_keys, of_lists)
        )
        return cls(ids, keys, bags)

    def own(
        self, ids: Any, keys: Keys, lists: Sequence[Padded]
    ) -> tuple[Any, Keys, tuple[Padded, ...]]:
        """Ids and keys [batch, columns] and the lists -> those of the tower."""
        own_lists = tuple(lists[j] for j in self.lists)
        return ids[:, list(self.ids)], keys[:, list(self.keys)], own_lists

    def named(self, ids: Any, keys: Keys, lists: Sequence[Padded] = ()) -> Keys:
        """What `own` takes, of NumPy or JAX -> one key for what the tower has of each row."""
        ids, keys, lists = self.own(ids, keys, lists)
        columns = [Keys.of(ids[:, j]) for j in range(len(self.ids))]
        columns += [keys[:, j] for j in range(len(self.keys))]
        columns += map(_bag, lists)
        return columns[0] if len(columns) == 1 else cross(*columns)


def _bag(padded: Padded) -> Keys:
    """One key for each list [batch], whatever the order of its elements: the sum of theirs."""
    mixed, taken = scramble(Keys.of(padded.ids)), padded.mask.astype(np.uint32)
    return Keys(*((word * taken).sum(axis=1, dtype=np.uint32) for word in (mixed.hi, mixed.lo)))


class Tower(nnx.Module):
    """Columns -> a vector.

    Args:
      configs: of the categorical columns, by name; may be none, if there are numbers.
      num_numbers: how many numbers a row has.
      sizes: widths of the layers; the last one, which is linear, is the vector's.
      lists: which of the columns are of lists.
      rngs: random number generators.
    """

    def __init__(
        self,
        configs: Mapping[str, ColumnConfig],
        *,
        num_numbers: int,
        sizes: Sequence[int],
        lists: Collection[str] = (),
        rngs: nnx.Rngs,
    ) -> None:
        inputs = num_numbers + sum(config.features for config in configs.values())
        hidden = (inputs, *sizes[:-1])
        self.has_columns = bool(configs)
        if configs:
            self.embeddings = Embeddings(configs, lists=lists, rngs=rngs)
        self.hidden = MLP(hidden, rngs=rngs)
        self.out = nnx.Linear(hidden[-1], sizes[-1], rngs=rngs)

    @property
    def growing(self) -> Sequence[GrowingColumns]:
        """The tables that grow."""
        return self.embeddings.growing if self.has_columns else ()

    def assign(self, *inputs: Any) -> list[tuple[Found, Counts]]:
        """See `Embeddings.assign`."""
        return self.embeddings.assign(*inputs) if self.has_columns else []

    def __call__(
        self,
        numbers: jax.Array,
        ids: jax.Array,
        keys: Keys,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> jax.Array:
        """Numbers [batch, num_numbers], ids, keys [batch, columns], lists -> [batch, sizes[-1]].

        Of tables that grow `found` is what `assign` gave.
        """
        each = self.embeddings(ids, keys, lists, found) if self.has_columns else []
        return self.out(self.hidden(jnp.concatenate([numbers, *each], axis=1)))


class TwoTower(nnx.Module):
    """A tower of queries and one of items.

    Args:
      configs: of the categorical columns, by name.
      items: those of them that describe the item.
      num_numbers: how many numbers a row has; they describe the query.
      sizes: widths of each tower's layers.
      lists: which of the columns are of lists.
      temperature: what the dot products of vectors of length 1 are divided by; 0: the vectors are
        taken as they are.
      rngs: random number generators.
    """

    def __init__(
        self,
        configs: Mapping[str, ColumnConfig],
        *,
        items: Sequence[str],
        num_numbers: int,
        sizes: Sequence[int],
        temperature: float,
        lists: Collection[str] = (),
        rngs: nnx.Rngs,
    ) -> None:
        of_items = {name: config for name, config in configs.items() if name in items}
        of_queries = {name: config for name, config in configs.items() if name not in items}
        self.query_columns = TowerColumns.of(configs, lists, of_queries)
        self.item_columns = TowerColumns.of(configs, lists, of_items)
        self.temperature = temperature
        self.query_tower = Tower(
            of_queries, num_numbers=num_numbers, sizes=sizes, lists=lists, rngs=rngs
        )
        self.item_tower = Tower(of_items, num_numbers=0, sizes=sizes, lists=lists, rngs=rngs)

    @property
    def all_embeddings(self) -> Sequence[Embeddings]:
        """What makes the vectors of columns: the queries', then the items'."""
        towers = (self.query_tower, self.item_tower)
        return [tower.embeddings for tower in towers if tower.has_columns]

    @property
    def growing(self) -> Sequence[GrowingColumns]:
        """The tables that grow: those of the queries, then those of the items."""
        return [*self.query_tower.growing, *self.item_tower.growing]

    def assign(
        self, ids: Any, keys: Keys, lists: Sequence[Padded], where: jax.Array, step: Any
    ) -> list[tuple[Found, Counts]]:
        """See `Embeddings.assign`."""
        of_queries = self.query_columns.own(ids, keys, lists)
        of_items = self.item_columns.own(ids, keys, lists)
        assigned = self.query_tower.assign(*of_queries, where, step)
        return assigned + self.item_tower.assign(*of_items, where, step)

    def queries(
        self,
        numbers: jax.Array,
        ids: jax.Array,
        keys: Keys,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> jax.Array:
        """Numbers, ids, keys and lists of whole rows -> the vectors of their queries."""
        own = self.query_columns.own(ids, keys, lists)
        return self._scaled(self.query_tower(numbers, *own, found))

    def items(
        self,
        ids: jax.Array,
        keys: Keys,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> jax.Array:
        """Ids and keys [n, item columns], their lists -> the vectors of items [n, width]."""
        numbers = jnp.zeros((ids.shape[0], 0))
        return self._scaled(self.item_tower(numbers, ids, keys, lists, found))

    def pair(
        self,
        numbers: jax.Array,
        ids: jax.Array,
        keys: Keys,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Whole rows -> the vectors of their queries and of their items [batch, width]."""
        of_queries = of_items = None
        if found is not None:
            of_first = len(self.query_tower.growing)
            of_queries, of_items = found[:of_first], found[of_first:]
        queries = self.queries(numbers, ids, keys, lists, of_queries)
        return queries, self.items(*self.item_columns.own(ids, keys, lists), of_items)

    def __call__(
        self,
        numbers: jax.Array,
        ids: jax.Array,
        keys: Keys,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> jax.Array:
        """Whole rows -> the scores [batch] of each one's query and item."""
        pairs = self.pair(numbers, ids, keys, lists, found)
        return jnp.sum(jnp.multiply(*pairs), axis=1)

    def _scaled(self, vectors: jax.Array) -> jax.Array:
        """Of the length at which dot products are scores."""
        if self.temperature == 0:
            return vectors
        squares = jnp.sum(vectors**2, axis=1, keepdims=True)
        return vectors * jax.lax.rsqrt(squares + 1e-12) / self.temperature**0.5


def build_towers(
    settings: Settings,
    configs: Mapping[str, ColumnConfig],
    items: Sequence[str],
    num_numbers: int,
    lists: Collection[str] = (),
) -> TwoTower:
    """The towers that the settings name, with the embeddings of `configs`."""
    return TwoTower(
        configs,
        items=items,
        num_numbers=num_numbers,
        sizes=widths("tower_mlp", settings.tower_mlp),
        temperature=settings.temperature,
        lists=lists,
        rngs=nnx.Rngs(settings.seed),
    )
