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
from qrhash.dynamic import DynamicConfig
from qrhash.nnx import as_table
from qrhash.nnx.variables import is_variable


def assign_rows(model: Any, batch: Batch, step: Any) -> tuple[Batch, Counts, dict[Any, jax.Array]]:
    """Gives rows to the new keys of a batch, in the model itself, unless a store gave them.

    Returns:
      The batch with its keys' rows; what became of them, [tables] each; and by the path of each
      table the rows that are new, as `reset` takes them.
    """
    if batch.found is None:
        inputs = (batch.ids, batch.keys, batch.lists, jnp.asarray(batch.weights) > 0, step)
        of_tables = model.assign(*inputs)
    else:
        of_tables = model.start(batch.found)
    found = [each for each, _ in of_tables]
    counts = jax.tree.map(lambda *each: jnp.stack(each), *(each for _, each in of_tables))
    new = {
        path: each.new_rows(table.table.config)
        for (path, table), each in zip(_tables(model), found, strict=True)
    }
    return batch._replace(found=found), counts, new


def table_paths(model: Any) -> list[Any]:
    """Where in a model's tables those that grow are, in its order."""
    return [path for path, _ in _tables(model)]


def _tables(model: Any) -> list[tuple[Any, GrowingColumns]]:
    """The tables that grow in a model, in its order, and the path of each one's variable."""
    paths = {id(node): path for path, node in nnx.iter_graph(model)}
    return [((*paths[id(each)], "table", "table"), each) for each in model.growing]


def as_arrays(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as optimizers know them by rows: arrays in place of variables."""
    return jax.tree.map(as_table, dict(params), is_leaf=is_variable)


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
    return reset_rows(tx, state, as_arrays(params), rows)


class Growth:
    """What became of the keys of a run so far.

    Args:
      configs: of the tables that grow.

    Attributes:
      totals: name of a count -> its sum over all steps and tables.
      num_keys: how many keys have a row of their own now.
      capacity: how many can have one.
    """

    def __init__(self, configs: Sequence[DynamicConfig]) -> None:
        self._num_tables = len(configs)
        self.capacity = sum(config.capacity for config in configs)
        self.num_keys = 0
        self.totals = dict.fromkeys(Counts._fields, 0)
        self._last = self.totals

    def nothing(self) -> Counts:
        """Counts of no steps, int32 [tables]."""
        return Counts(*(np.zeros(self._num_tables, np.int32) for _ in Counts._fields))

    def add(self, counts: Counts, num_keys: int) -> None:
        """Takes note of some steps, by sums of their counts, and of how many keys have a row."""
        found = {name: int(np.sum(value)) for name, value in counts._asdict().items()}
        self.totals = {name: value + found[name] for name, value in self.totals.items()}
        self._last = found if found["looked_up"] else self._last
        self.num_keys = num_keys

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
