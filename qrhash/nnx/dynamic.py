"""`DynamicEmbed`: a table that grows, with the index of its keys.

As with running statistics, what a step changes besides parameters is a variable of the module:
the `qrhash.dynamic.State`, integers, of a type of its own.
"""

from typing import Any

import jax
from flax import nnx

from qrhash import dynamic
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.embedding import Parameters, State
from qrhash.dynamic.found import Found
from qrhash.nnx.variables import KeyState, annotated, array_of, as_table, table_variable
from qrhash.operations import Projection
from qrhash.types import Array, Scalar


class DynamicEmbed(nnx.Module):
    """Vectors of keys that come and go; see `qrhash.dynamic`.

    The parameters are named as in `qrhash.linen.DynamicEmbed`: `table`, the keys' own rows, and of
    the compressed vectors `refused_0`, `refused_1`, ..., which are of type `Table`, and for
    operation "project" `refused_kernel` and `refused_bias`. `state` is a `KeyState`.

    Args:
      config: the `qrhash.dynamic.DynamicConfig`.
      has_state: whether the module knows which key has which row; else a `dynamic.Tiered` does, on
        the host, the config is its own, and there is `start` in place of `assign` and `find`.
      rngs: random number generators; the stream "params" initialises the parameters.

    >>> import optax, qrhash
    >>> refused = qrhash.EmbedConfig(qrhash.KeyDigits(32, num_tables=2), 8)
    >>> embed = DynamicEmbed(DynamicConfig(1000, 8, refused=refused), rngs=nnx.Rngs(0))
    >>> optimizer = qrhash.nnx.Optimizer(embed, optax.adagrad(0.1))
    >>> found = embed.assign(["shoes", "hats", "shoes"], step=0)
    >>> optimizer.reset_rows(embed, embed, found)
    >>> loss, grads = qrhash.nnx.value_and_grad(lambda embed: (embed(found) ** 2).sum())(embed)
    >>> updates = optimizer.update(embed, grads)
    >>> int(embed.num_keys), embed(embed.find(["socks"])).shape
    (2, (1, 8))
    """

    def __init__(self, config: DynamicConfig, *, has_state: bool = True, rngs: nnx.Rngs) -> None:
        self.config = config
        if has_state:
            self.state = KeyState(dynamic.init_state(config))
        made = dynamic.init(rngs.params(), config)
        self.table = _variable(made.table, config.own, 0)
        refused = config.refused
        if refused is None:
            return
        for j, table in enumerate(made.refused):
            setattr(self, f"refused_{j}", _variable(table, refused, j))
        for field in refused.projection_fields:
            value, axes = getattr(made.projection, field), getattr(refused.projection_axes, field)
            setattr(self, f"refused_{field}", annotated(nnx.Param, value, axes))

    @property
    def features(self) -> int:
        """Width of the vectors."""
        return self.config.features

    @property
    def num_keys(self) -> Any:
        """How many keys have a row, int32 []."""
        return self._state.index.num_keys

    @property
    def _state(self) -> State:
        state: State = self.state.get_value()
        return state

    @property
    def parameters(self) -> Parameters:
        """The `qrhash.dynamic.Parameters`."""
        refused = self.config.refused
        if refused is None:
            return Parameters(as_table(self.table))
        tables = (as_table(getattr(self, f"refused_{j}")) for j in range(refused.num_tables))
        fields = refused.projection_fields
        values = (getattr(self, f"refused_{field}")[...] for field in fields)
        projection = Projection(*values) if fields else None
        return Parameters(as_table(self.table), tuple(tables), projection)

    def assign(self, keys: Any, step: Scalar, *, where: Array | None = None) -> Found:
        """The rows of keys in a step of the training, of which the new ones are started.

        Counts the keys, gives rows to those admitted, and writes what these start with:
        `qrhash.dynamic.assign` and `start_rows`. It belongs before the function that is
        differentiated; `Optimizer.reset_rows` then does the same for the optimizer's state.

        Args:
          keys: `qrhash.Keys` [*shape], or what `Keys.of` takes; or a `qrhash.Bag` of such.
          step: the number of the step, from 0 on.
          where: which of the keys are meant, bool [*shape].

        Returns:
          The keys with their rows, as the module takes them.
        """
        state, found = dynamic.assign(self._state, keys, self.config, step, where=where)
        self.state.set_value(state)
        self.start(found)
        return found

    def start(self, found: Found) -> None:
        """Writes what the rows of new keys start with: see `qrhash.dynamic.start_rows`.

        Args:
          found: the keys of a step, as `Tiered` gives them.
        """
        started, _ = dynamic.start_rows(self.parameters, found, self.config)
        self.table.set_value(array_of(started.table))

    def new_rows(self, found: Found) -> dict[str, jax.Array]:
        """Name of the table -> rows that keys have just got, as `assign` gave them."""
        return {"table": found.new_rows(self.config)}

    def find(self, keys: Any, *, where: Array | None = None) -> Found:
        """The rows of keys outside of the training; see `qrhash.dynamic.find`.

        Args:
          keys: as in `assign`.
          where: as in `assign`.
        """
        return dynamic.find(self._state, keys, self.config, where=where)

    def evict(self, step: Scalar) -> jax.Array:
        """Takes rows back from the keys that the config's eviction names.

        Args:
          step: the number of the step.

        Returns:
          How many keys have lost their row, int32 [].

        Raises:
          ValueError: the config has no eviction.
        """
        state, count = dynamic.evict(self._state, self.parameters, self.config, step)
        self.state.set_value(state)
        return count

    def __call__(self, inputs: Found, out_sharding: Any = None) -> jax.Array:
        """The vectors of keys; see `qrhash.dynamic.lookup`.

        Args:
          inputs: as `assign` or `find` gives it.
          out_sharding: where the vectors are to be, on a mesh.

        Returns:
          Vectors [*shape, features]; of a bag one for each.
        """
        return dynamic.lookup(self.parameters, inputs, self.config, out_sharding=out_sharding)


def _variable(table: Any, config: Any, number: int) -> Any:
    return table_variable(table, config.table_axes(number), is_large=config.large_tables[number])
