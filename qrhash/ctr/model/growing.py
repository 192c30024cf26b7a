"""The columns that share a table that grows, in Flax NNX.

A key of the table is a key of a column crossed with the column's name, so that equal keys of two
columns have rows of their own, and rows go wherever the keys are met most.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qrhash import Bag, Keys, dynamic
from qrhash.ctr.data.pipeline import Padded
from qrhash.dynamic import DynamicConfig, Found
from qrhash.keys import cross
from qrhash.nnx import DynamicEmbed


class Counts(NamedTuple):
    """What became of the keys of a step, int32 [] each.

    Attributes:
      looked_up: how many there were, each as often as it occurs.
      in_rows: of these, how many had a row of their own.
      admitted: distinct ones that got one.
      no_room: distinct ones that had earned one, and there was none left.
      evicted: distinct ones that have lost theirs since.
    """

    looked_up: Any
    in_rows: Any
    admitted: Any
    no_room: Any
    evicted: Any


class GrowingColumns(nnx.Module):
    """The columns of one table that grows.

    Args:
      config: of the table.
      combiners: column name -> how the vectors of a list are pooled.
      lists: which of the columns are of lists.
      in_store: whether rows come from a store, and the host knows which key has which.
      rngs: random number generators.
    """

    def __init__(
        self,
        config: DynamicConfig,
        combiners: Mapping[str, str],
        *,
        lists: Collection[str] = (),
        in_store: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.single = tuple(name for name in combiners if name not in lists)
        self.of_lists = tuple((name, how) for name, how in combiners.items() if name in lists)
        self.table = DynamicEmbed(config, has_state=not in_store, rngs=rngs)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        return (*self.single, *(name for name, _ in self.of_lists))

    def assign(
        self, keys: Mapping[str, Keys], lists: Mapping[str, Padded], where: jax.Array, step: Any
    ) -> tuple[Found, Counts]:
        """Counts the keys of a step of the training, and gives rows to new ones.

        Args:
          keys: column name -> `Keys` [batch].
          lists: column name -> its lists.
          where: which rows are meant, bool [batch]: not the padding.
          step: the number of the step.

        Returns:
          The keys with their rows, as the module takes them, and what became of them.
        """
        every, meant = self.joined(keys, lists)
        return self._counted(self.table.assign(every, step, where=meant & where[:, None]))

    def start(self, found: Found) -> tuple[Found, Counts]:
        """Starts the rows of new keys, where a store gave them rows; gives what `assign` does."""
        self.table.start(found)
        return self._counted(found)

    def _counted(self, found: Found) -> tuple[Found, Counts]:
        in_rows = found.meant & (found.rows.rows < self.table.config.capacity)
        looked_up, has_row, admitted = (
            jnp.sum(each, dtype=jnp.int32) for each in (found.meant, in_rows, found.rows.is_new)
        )
        return found, Counts(looked_up, has_row, admitted, found.rows.no_room, jnp.int32(0))

    def find(self, keys: Mapping[str, Keys], lists: Mapping[str, Padded]) -> Found:
        """The keys with the rows that they have; elsewhere than in a training, as `assign`."""
        every, meant = self.joined(keys, lists)
        return self.table.find(every, where=meant)

    def __call__(self, found: Found, lists: Mapping[str, Padded]) -> dict[str, jax.Array]:
        """The vectors of all columns.

        Args:
          found: what `assign` or `find` gives.
          lists: as they were given to it.

        Returns:
          Column name -> vectors [batch, features].
        """
        at = len(self.single)
        vectors: dict[str, jax.Array] = {}
        if at:
            of_single = self.table(_places(found, slice(at)))
            vectors = {name: of_single[:, j] for j, name in enumerate(self.single)}
        for name, combiner in self.of_lists:
            length = lists[name].mask.shape[1]
            some = _places(found, slice(at, at := at + length))
            bag = Bag.from_padded(some.keys, mask=some.meant)
            config = replace(self.table.config, combiner=combiner)
            in_bags = Found(bag, some.rows.in_shape((bag.capacity,)), bag.in_bag)
            vectors[name] = dynamic.lookup(self.table.parameters, in_bags, config)
        return vectors

    def of_keys(self, name: str, keys: Keys) -> tuple[jax.Array, jax.Array]:
        """Keys [n] of one column, not pooled, outside of a training.

        Returns:
          Their vectors [n, features], and whether each has a row of its own, bool [n].
        """
        found = self.table.find(of_column(name, keys))
        return self.table(found), found.rows.rows < self.table.config.capacity

    def joined(
        self, keys: Mapping[str, Keys], lists: Mapping[str, Padded]
    ) -> tuple[Keys, jax.Array]:
        """The keys of all columns [batch, places], and which of them are meant."""
        of_table = [of_column(name, keys[name])[:, None] for name in self.single]
        meant = [jnp.ones(each.shape, bool) for each in of_table]
        for name, _ in self.of_lists:
            of_table.append(of_column(name, lists[name].ids))
            meant.append(jnp.asarray(lists[name].mask))
        joined = jax.tree.map(lambda *words: jnp.concatenate(words, axis=1), *of_table)
        return joined, jnp.concatenate(meant, axis=1)


def of_column(name: str, keys: Keys) -> Keys:
    """The keys of a column [*shape] as the table has them."""
    return cross(Keys.of([name])[0], keys)


def _places(found: Found, which: slice) -> Found:
    """Some of the places [batch, places] of every row."""
    of_all = found.rows
    rows = of_all._replace(rows=of_all.rows[:, which], is_new=of_all.is_new[:, which])
    return Found(found.keys[:, which], rows, found.meant[:, which])
