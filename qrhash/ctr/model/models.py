"""DLRM and DCN-v2 in Flax NNX.

Both take the numbers of a row and one vector for each column of categories, or of lists of them,
and give the logit of a click. DLRM (Naumov et al., arXiv 1906.00091) lets the vectors meet in
pairs, by their dot products; DCN-v2 (Wang et al., arXiv 2008.13535) multiplies their concatenation
x_0 with linear maps of it, x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, beside an ordinary MLP.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qrhash import Bag, EmbedConfig, Keys
from qrhash.ctr.data.pipeline import Padded
from qrhash.ctr.model.growing import Counts, GrowingColumns
from qrhash.ctr.model.pools import as_embeddings
from qrhash.ctr.model.room import ColumnConfig, dynamic_tables, stored_table
from qrhash.ctr.options import widths
from qrhash.ctr.settings import Settings
from qrhash.dynamic import DynamicConfig, Found, cached
from qrhash.nnx import EmbedCollection


class MLP(nnx.Module):
    """Linear layers, each with a relu."""

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, sizes[0]] -> [batch, sizes[-1]]."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Embeddings(nnx.Module):
    """One embedding for each column, all of them in few stacked tables, or in tables that grow.

    Args:
      configs: of the columns, by name; columns of equal `DynamicConfig`s share one table, those in
        a pool its tables.
      lists: which of them are of lists: the vectors of their elements are pooled.
      cache_rows: how many rows of a table that grows the model has, where a store has them all.
      rngs: random number generators.
    """

    def __init__(
        self,
        configs: Mapping[str, ColumnConfig],
        *,
        lists: Collection[str] = (),
        cache_rows: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.names = tuple(configs)
        in_keys = {name: takes_keys(config) for name, config in configs.items()}
        self.of_lists = tuple(name for name in self.names if name in lists)
        single = [name for name in self.names if name not in lists]
        self.of_ids = tuple(name for name in single if not in_keys[name])
        self.of_keys = tuple(name for name in single if in_keys[name])
        fixed = {name: each for name, each in configs.items() if isinstance(each, EmbedConfig)}
        self.fixed = tuple(fixed)
        if fixed:
            self.columns = EmbedCollection(as_embeddings(fixed), rngs=rngs)
        self.growing = nnx.List(
            GrowingColumns(
                table if cache_rows is None else cached(table, cache_rows),
                {name: configs[name].combiner for name in names},
                lists=lists,
                in_store=cache_rows is not None,
                rngs=rngs,
            )
            for table, names in dynamic_tables(configs).items()
        )

    def assign(
        self, ids: Any, keys: Keys | None, lists: Sequence[Padded], where: jax.Array, step: Any
    ) -> list[tuple[Found, Counts]]:
        """Gives rows to keys in a step of the training: for each of the tables that grow.

        Args:
          ids: [batch, columns], of which nothing is asked.
          keys: [batch, columns].
          lists: the columns of lists.
          where: which rows are meant, bool [batch].
          step: the number of the step.
        """
        del ids
        of_keys, of_lists = self._keys(keys), self._lists(lists)
        return [table.assign(of_keys, of_lists, where, step) for table in self.growing]

    def start(self, found: Sequence[Found]) -> list[tuple[Found, Counts]]:
        """Starts the rows that a store gave to new keys; gives what `assign` does."""
        return [table.start(each) for table, each in zip(self.growing, found, strict=True)]

    def keys_of_growing(
        self, keys: Keys | None, lists: Sequence[Padded]
    ) -> list[tuple[Keys, jax.Array]]:
        """The keys [batch, places] of each table that grows, and which of them are meant."""
        of_keys, of_lists = self._keys(keys), self._lists(lists)
        return [table.joined(of_keys, of_lists) for table in self.growing]

    def __call__(
        self,
        ids: jax.Array,
        keys: Keys | None = None,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> list[jax.Array]:
        """The vectors of rows.

        Args:
          ids: [batch, columns], of those that have ids.
          keys: [batch, columns], of those that take keys.
          lists: the columns of lists.
          found: what `assign` gave of them; without it, keys have the rows that they have.

        Returns:
          For each column vectors [batch, features].
        """
        of_keys, of_lists = self._keys(keys), self._lists(lists)
        single = self._columns("ids", ids, self.of_ids) | of_keys
        bags = {name: Bag.from_padded(each.ids, mask=each.mask) for name, each in of_lists.items()}
        inputs = single | bags
        vectors: dict[str, jax.Array] = {}
        if self.fixed:
            vectors = self.columns({name: inputs[name] for name in self.fixed})
        if found is None:
            found = [table.find(of_keys, of_lists) for table in self.growing]
        for table, of_table in zip(self.growing, found, strict=True):
            vectors |= table(of_table, of_lists)
        return [vectors[name] for name in self.names]

    def of_column(self, name: str, taken: Any) -> tuple[jax.Array, jax.Array]:
        """Ids, or `Keys`, [n] of one column, not pooled, outside of a training.

        Args:
          name: of the column.
          taken: what it takes.

        Returns:
          Their vectors [n, features], and whether each has rows of its own in a table that grows,
          bool [n].
        """
        for table in self.growing:
            if name in table.names:
                return table.of_keys(name, taken)
        vectors = self.columns({name: taken})[name]
        return vectors, jnp.zeros(len(vectors), bool)

    def _keys(self, keys: Keys | None) -> dict[str, Keys]:
        return self._columns("keys", keys, self.of_keys) if self.of_keys else {}

    def _lists(self, lists: Sequence[Padded]) -> dict[str, Padded]:
        if len(lists) != len(self.of_lists):
            raise ValueError(
                f"lists must be those of the columns {', '.join(self.of_lists)}, got {len(lists)}."
            )
        return dict(zip(self.of_lists, lists, strict=True))

    def _columns(self, what: str, values: Any, names: tuple[str, ...]) -> dict[str, Any]:
        shape = None if values is None else values.shape
        if shape is None or len(shape) != 2 or shape[1] != len(names):
            raise ValueError(
                f"{what} must have shape [batch, {len(names)}], of the columns "
                f"{', '.join(names)}, got {shape}."
            )
        return {name: values[:, j] for j, name in enumerate(names)}


def column_vectors(model: Any, name: str, taken: Any) -> tuple[jax.Array, jax.Array]:
    """`Embeddings.of_column`, of those of a model that have the column."""
    (embeddings,) = (each for each in model.all_embeddings if name in each.names)
    found: tuple[jax.Array, jax.Array] = embeddings.of_column(name, taken)
    return found


def takes_keys(config: ColumnConfig) -> bool:
    """Whether an embedding takes keys, not ids."""
    return isinstance(config, DynamicConfig) or config.partition.takes_keys


class _Clicks(nnx.Module):
    """What the models of clicks have in common."""

    embeddings: Embeddings

    @property
    def all_embeddings(self) -> Sequence[Embeddings]:
        """What makes the vectors of columns."""
        return [self.embeddings]

    @property
    def growing(self) -> Sequence[GrowingColumns]:
        """The tables that grow."""
        return self.embeddings.growing

    def assign(self, *inputs: Any) -> list[tuple[Found, Counts]]:
        """See `Embeddings.assign`."""
        return self.embeddings.assign(*inputs)

    def start(self, found: Sequence[Found]) -> list[tuple[Found, Counts]]:
        """See `Embeddings.start`."""
        return self.embeddings.start(found)

    def keys_of_growing(self, *inputs: Any) -> list[tuple[Keys, jax.Array]]:
        """See `Embeddings.keys_of_growing`."""
        return self.embeddings.keys_of_growing(*inputs)


class DLRM(_Clicks):
    """The deep learning recommendation model.

    Args:
      configs: of the categorical columns, by name, all `features` wide.
      num_numbers: how many numbers a row has. Without any there is no bottom MLP, and the top one
        takes the vectors themselves in place of what that makes.
      features: width of the vectors, and of what the bottom MLP makes of the numbers.
      bottom: hidden widths of the bottom MLP.
      top: hidden widths of the top MLP.
      lists: which of the columns are of lists.
      cache_rows: see `Embeddings`.
      rngs: random number generators.
    """

    def __init__(
        self,
        configs: Mapping[str, ColumnConfig],
        *,
        num_numbers: int,
        features: int,
        bottom: Sequence[int],
        top: Sequence[int],
        lists: Collection[str] = (),
        cache_rows: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        vectors = len(configs) + bool(num_numbers)
        self.embeddings = Embeddings(configs, lists=lists, cache_rows=cache_rows, rngs=rngs)
        if num_numbers:
            self.bottom = MLP((num_numbers, *bottom, features), rngs=rngs)
        direct = features if num_numbers else vectors * features
        top_sizes = (direct + vectors * (vectors - 1) // 2, *top)
        self.top = MLP(top_sizes, rngs=rngs)
        self.logit = nnx.Linear(top_sizes[-1], 1, rngs=rngs)

    def __call__(
        self,
        numbers: jax.Array,
        ids: jax.Array,
        keys: Keys | None = None,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> jax.Array:
        """Numbers [batch, num_numbers], ids and keys [batch, columns], lists -> logits [batch].

        Of tables that grow `found` is what `assign` gave.
        """
        each = self.embeddings(ids, keys, lists, found)
        if numbers.shape[1]:
            direct = self.bottom(numbers)
            each = [direct, *each]
        else:
            direct = jnp.concatenate(each, axis=1)
        vectors = jnp.stack(each, axis=1)
        products = jnp.einsum("bif,bjf->bij", vectors, vectors)
        pairs = products[:, *jnp.triu_indices(vectors.shape[1], k=1)]
        return self.logit(self.top(jnp.concatenate([direct, pairs], axis=1)))[:, 0]


class DCN(_Clicks):
    """The deep and cross network, version 2, with full matrices.

    Args:
      configs: of the categorical columns, by name.
      num_numbers: how many numbers a row has.
      cross_layers: number of cross layers.
      deep: hidden widths of the MLP beside them.
      lists: which of the columns are of lists.
      cache_rows: see `Embeddings`.
      rngs: random number generators.
    """

    def __init__(
        self,
        configs: Mapping[str, ColumnConfig],
        *,
        num_numbers: int,
        cross_layers: int,
        deep: Sequence[int],
        lists: Collection[str] = (),
        cache_rows: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = num_numbers + sum(config.features for config in configs.values())
        deep_sizes = (inputs, *deep)
        self.embeddings = Embeddings(configs, lists=lists, cache_rows=cache_rows, rngs=rngs)
        self.cross = nnx.List(nnx.Linear(inputs, inputs, rngs=rngs) for _ in range(cross_layers))
        self.deep = MLP(deep_sizes, rngs=rngs)
        self.logit = nnx.Linear(inputs + deep_sizes[-1], 1, rngs=rngs)

    def __call__(
        self,
        numbers: jax.Array,
        ids: jax.Array,
        keys: Keys | None = None,
        lists: Sequence[Padded] = (),
        found: Sequence[Found] | None = None,
    ) -> jax.Array:
        """Numbers [batch, num_numbers], ids and keys [batch, columns], lists -> logits [batch].

        Of tables that grow `found` is what `assign` gave.
        """
        each = self.embeddings(ids, keys, lists, found)
        x0 = jnp.concatenate([numbers, *each], axis=1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        return self.logit(jnp.concatenate([x, self.deep(x0)], axis=1))[:, 0]


def build_model(
    settings: Settings,
    configs: Mapping[str, ColumnConfig],
    num_numbers: int,
    lists: Collection[str] = (),
) -> DLRM | DCN:
    """The model the settings name, with the embeddings of `configs`, `lists` among them."""
    rngs = nnx.Rngs(settings.seed)
    stored = stored_table(settings, configs)
    cache_rows = None if stored is None else settings.cache_rows
    if settings.model == "dcn":
        return DCN(
            configs,
            num_numbers=num_numbers,
            cross_layers=settings.cross_layers,
            deep=widths("deep_mlp", settings.deep_mlp),
            lists=lists,
            cache_rows=cache_rows,
            rngs=rngs,
        )
    return DLRM(
        configs,
        num_numbers=num_numbers,
        features=settings.features,
        bottom=widths("bottom_mlp", settings.bottom_mlp),
        top=widths("top_mlp", settings.top_mlp),
        lists=lists,
        cache_rows=cache_rows,
        rngs=rngs,
    )
