"""What becomes of the keys of tables that grow, in a step and over a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qrhash import reset_rows
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.model.growing import Counts, GrowingColumns
from qrhash.dynamic.embedding import new_rows
from qrhash.nnx import as_table
from qrhash.nnx.variables import is_variable


def assign_rows(model: Any, batch: Batch, step: Any) -> tuple[Batch, Counts, dict[Any, jax.Array]]:
    """Gives rows to the new keys of a batch, in the model itself.

    Returns:
      The batch with its keys' rows; what became of them, [tables] each; and by the path of each
      table the rows that are new, as `reset` takes them.
    """
    inputs = (batch.ids, batch.keys, batch.lists, jnp.asarray(batch.weights) > 0, step)
    of_tables = model.assign(*inputs)
    found = [each for each, _ in of_tables]
    counts = jax.tree.map(lambda *each: jnp.stack(each), *(each for _, each in of_tables))
    new = {
        path: new_rows(each, table.table.config)
        for (path, table), each in zip(_tables(model), found, strict=True)
    }
    return batch._replace(found=found), counts, new


def _tables(model: Any) -> list[tuple[Any, GrowingColumns]]:
    """The tables that grow in a model, in its order, and the path of each one's variable."""
    paths = {id(node): path for path, node in nnx.iter_graph(model)}
    return [((*paths[id(each)], "table", "table"), each) for each in model.growing]


def reset(
    tx: optax.GradientTransformation,
    state: Any,
    params: Mapping[str, Any],
    new: Mapping[Any, jax.Array],
) -> Any:
    """The optimizer's state of rows that are new as it is at the start.

    Args:
      tx: the transformation.
      state: its state.
      params: {"tables": tables, ...}.
      new: path of a table -> its new rows.
    """
    flat = {path: new.get(path) for path, _ in nnx.to_flat_state(params["tables"])}
    rows = dict.fromkeys(params) | {"tables": nnx.from_flat_state(flat)}
    tables = jax.tree.map(as_table, dict(params), is_leaf=is_variable)
    return reset_rows(tx, state, tables, rows)


class Growth:
    """What became of the keys of a run so far.

    Args:
      tables: the tables that grow.

    Attributes:
      totals: name of a count -> its sum over all steps and tables.
      num_keys: how many keys have a row of their own now.
      capacity: how many can have one.
    """

    def __init__(self, tables: Sequence[GrowingColumns]) -> None:
        self._num_tables = len(tables)
        self.capacity = sum(each.table.config.capacity for each in tables)
        self.num_keys = 0
        self.totals = dict.fromkeys(Counts._fields, 0)
        self._last = self.totals

    def nothing(self) -> Counts:
        """Counts of no steps, int32 [tables]."""
        return Counts(*(np.zeros(self._num_tables, np.int32) for _ in Counts._fields))

    def add(self, counts: Counts, keys: Any) -> None:
        """Takes note of some steps, by sums of their counts, and of which key has which row."""
        found = {name: int(np.sum(value)) for name, value in counts._asdict().items()}
        self.totals = {name: value + found[name] for name, value in self.totals.items()}
        self._last = found if found["looked_up"] else self._last
        states = [each.get_value() for _, each in nnx.to_flat_state(keys)]
        self.num_keys = sum(int(state.index.num_keys) for state in states)

    @property
    def note(self) -> str:
        """In words, for the steps that were counted last."""
        if not self._last["looked_up"]:
            return ""
        share = self._last["in_rows"] / self._last["looked_up"]
        return f"rows {self.num_keys:,} of {self.capacity:,}, {share:.0%} of keys in them"

    def as_dict(self) -> dict[str, int]:
        """All of it, as JSON can hold it."""
        return {"num_keys": self.num_keys, **self.totals}

    def take_over(self, saved: Mapping[str, int]) -> None:
        """Stands where `as_dict` was taken."""
        self.num_keys = saved["num_keys"]
        self.totals = {name: saved[name] for name in Counts._fields}
