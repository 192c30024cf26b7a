"""`CollectionConfig`: the embeddings of many features, and the few stacked tables that keep them.

All tables of one width, dtype and kind (large and trained by rows, or small and dense) are put on
top of each other. Which rows of a stack are a feature's own is known when the config is built.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import as_fields
from qrhash.config import EmbedConfig
from qrhash.key_families import KeyDigits, MultiHash
from qrhash.kinds import put_table, whole_table
from qrhash.parts import Composite, Shared, as_plain, checked, from_plain, ordinary
from qrhash.spans import Span, Stack, stacks_of
from qrhash.strings import hash_strings
from qrhash.types import Array

_OfKeys = TypeVar("_OfKeys", bound=KeyDigits | MultiHash)


def of_feature(partition: _OfKeys, name: str) -> _OfKeys:
    """The partition by hashes of a feature's own, in a pool; of that one, the pool's again."""
    hashed = int(hash_strings([name])[0]) % 2**32
    return dataclasses.replace(partition, seed=partition.seed ^ hashed)


@dataclasses.dataclass(frozen=True)
class CollectionConfig:
    """The embeddings of many features.

    Attributes:
      embeddings: feature name -> its `EmbedConfig`, or `qrhash.dynamic.DynamicConfig`; or the name
        of another feature, whose tables and projection it then shares; or `Shared`, to share them
        by a partition of its own. A mapping, kept as a tuple of pairs.

    Raises:
      ValueError: a feature shares with one that is not there, or that itself shares, or by a
        partition of other tables; or tables of one stack differ in their logical axes; or a feature
        has the name of a part of another.

    >>> from qrhash.families import FullTable, QuotientRemainder
    >>> item = EmbedConfig(QuotientRemainder(1_000_000, 4), 16)
    >>> day = EmbedConfig(FullTable(7), 16)
    >>> config = CollectionConfig({"item": item, "last_item": "item", "day": day})
    >>> config.large_tables  # large of `qrhash.value_and_grad`
    {'large_16_float32': True, 'small_16_float32': False}
    >>> [(stack.name, stack.shape) for stack in config.stacks]
    [('large_16_float32', (250000, 16)), ('small_16_float32', (11, 16))]
    """

    embeddings: Any

    def __post_init__(self) -> None:
        if not isinstance(self.embeddings, (Mapping, tuple)):
            raise ValueError(
                f"embeddings must be a mapping of names to EmbedConfigs, got {self.embeddings!r}."
            )
        object.__setattr__(self, "embeddings", tuple(checked(dict(self.embeddings)).items()))
        _ = self.stacks  # raises now if tables do not go together

    @classmethod
    def one_pool(cls, features: Iterable[str], config: EmbedConfig) -> Self:
        """Many features in one set of tables, each by hashes of its own.

        Which rows a feature has goes by its name, not by its place: features may be added.

        Args:
          features: their names; the first one owns the tables.
          config: of all of them, with a partition that has a seed: `KeyDigits`, `MultiHash`.

        Raises:
          ValueError: no feature, or a partition without a seed.

        Source: Coleman et al. 2023, Unified Embedding (arXiv 2305.12102).

        >>> from qrhash.key_families import MultiHash
        >>> one = EmbedConfig(MultiHash((50_000, 50_000)), 16, "concat")
        >>> config = CollectionConfig.one_pool(["user", "item", "shop"], one)
        >>> config.num_params == one.num_params
        True
        """
        names = list(features)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"features must be names, each once, got {names!r}.")
        partition = getattr(config, "partition", config)
        if not isinstance(partition, (KeyDigits, MultiHash)):
            raise ValueError(
                "one_pool needs an EmbedConfig of a partition with a seed, KeyDigits or MultiHash, "
                f"got {partition!r}."
            )

        own, *others = (of_feature(partition, name) for name in names)
        embeddings: dict[str, Any] = {names[0]: dataclasses.replace(config, partition=own)}
        for name, other in zip(names[1:], others, strict=True):
            embeddings[name] = Shared(names[0], other)
        return cls(embeddings)

    @functools.cached_property
    def parts(self) -> tuple[tuple[str, EmbedConfig | Shared], ...]:
        """The embeddings, with the parts of dynamic ones in their places."""
        return tuple(ordinary(dict(self.embeddings)))

    @property
    def own_configs(self) -> dict[str, EmbedConfig]:
        """Feature name -> config, of the features that have tables of their own.

        A dynamic feature's own rows go by its name, the tables of its compressed vectors by
        "<name>:refused".
        """
        return {name: value for name, value in self.parts if isinstance(value, EmbedConfig)}

    @property
    def owner_of(self) -> dict[str, str]:
        """Feature name -> name of the feature whose tables it uses: its own, or shared."""
        return {
            name: value.owner if isinstance(value, Shared) else name for name, value in self.parts
        }

    @property
    def configs(self) -> dict[str, EmbedConfig]:
        """Feature name -> config, of every feature; of dynamic ones those of their parts."""
        own = self.own_configs
        return {
            name: value.of(own[value.owner]) if isinstance(value, Shared) else value
            for name, value in self.parts
        }

    @property
    def composites(self) -> dict[str, Any]:
        """Feature name -> config, of the features that are made of parts: the dynamic ones."""
        own = dict(self.embeddings)
        configs = {
            name: value.of(own[value.owner]) if isinstance(value, Shared) else value
            for name, value in self.embeddings
        }
        return {name: each for name, each in configs.items() if isinstance(each, Composite)}

    @functools.cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacked tables: one per width, dtype and kind."""
        return tuple(stacks_of(self.own_configs))

    @functools.cached_property
    def spans(self) -> dict[tuple[str, int], tuple[str, Span]]:
        """Feature name and number of a table -> name of its stack, and where it stands there."""
        return {
            (span.feature, span.table): (stack.name, span)
            for stack in self.stacks
            for span in stack.spans
        }

    @property
    def large_tables(self) -> dict[str, bool]:
        """Stack name -> whether it is trained by rows: `large` of `qrhash.value_and_grad`."""
        return {stack.name: stack.is_large for stack in self.stacks}

    @property
    def num_params(self) -> int:
        """Parameters in all, tables and projections."""
        return sum(config.num_params for config in self.own_configs.values())

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it; see `EmbedConfig.to_dict`."""
        return {name: as_plain(value) for name, value in self.embeddings}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, devices: Sequence[Any] | None = None) -> Self:
        """The config of which `to_dict` made these values; see `EmbedConfig.from_dict`."""
        embeddings = as_fields("config", values)
        return cls({name: from_plain(value, devices) for name, value in embeddings.items()})


def as_collection_config(config: Any) -> CollectionConfig:
    """A config of many features, also from a mapping."""
    return config if isinstance(config, CollectionConfig) else CollectionConfig(config)


def unstack(stacks: Mapping[str, Any], config: CollectionConfig) -> dict[str, tuple[Array, ...]]:
    """The tables of each feature.

    Args:
      stacks: {stack name: array [rows, ...]}: stacked tables, or optimizer state laid out as they
        are.
      config: the `CollectionConfig`.

    Returns:
      {feature name: k arrays [rows_j, ...]}, of the features that have tables of their own.
    """
    config = as_collection_config(config)
    missing = [stack.name for stack in config.stacks if stack.name not in stacks]
    if missing:
        raise ValueError(f"stacks must be as from init, {missing[0]} is missing.")
    whole = {name: whole_table(table) for name, table in stacks.items()}
    return {name: tables_of(whole, config, name) for name in config.own_configs}


def tables_of(stacks: Mapping[str, Any], config: CollectionConfig, name: str) -> tuple[Array, ...]:
    """The tables of one feature that has its own."""
    numbers = itertools.takewhile(lambda j: (name, j) in config.spans, itertools.count())
    spans = (config.spans[name, j] for j in numbers)
    return tuple(
        whole_table(stacks[of])[span.offset : span.offset + span.num_rows] for of, span in spans
    )


def stack(tables: Mapping[str, tuple[Array, ...]], config: CollectionConfig) -> dict[str, Any]:
    """The stacks of the features' tables: the inverse of `unstack`.

    Args:
      tables: {feature name: k arrays [rows_j, ...]}, of all features that have tables of their own.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, ...]}.

    Raises:
      ValueError: a feature is missing or unknown, a table has another number of rows, or tables of
        one stack differ in width or dtype.
    """
    config = as_collection_config(config)
    if not isinstance(tables, Mapping):
        raise ValueError(f"tables must be a mapping of features to tables, got {type(tables)}.")
    unknown = [name for name in tables if name not in config.own_configs]
    if unknown:
        raise ValueError(
            f"tables must be of features that have their own, {', '.join(config.own_configs)}, got "
            f"{unknown[0]!r}."
        )
    for name, owned in config.own_configs.items():
        of_feature = tables.get(name, ())
        if hasattr(of_feature, "shape"):
            raise ValueError(
                f"tables[{name!r}] must be a tuple of {owned.num_tables} arrays, got one array of "
                f"shape {of_feature.shape}."
            )
        if not isinstance(of_feature, Sequence) or not all(
            hasattr(table, "shape") for table in of_feature
        ):
            raise ValueError(
                f"tables[{name!r}] must be a tuple of {owned.num_tables} arrays, got "
                f"{of_feature!r}."
            )
        got = tuple(table.shape[0] for table in of_feature)
        if got != owned.partition.num_rows:
            raise ValueError(
                f"tables[{name!r}] must have {owned.partition.num_rows} rows, got {got}."
            )
    stacks: dict[str, Any] = {}
    for each in config.stacks:
        parts = [whole_table(tables[span.feature][span.table]) for span in each.spans]
        _check_alike(each, parts)
        # On the host where the parts are: from there every device gets its own rows alone.
        xp = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
        layout = each.layout if each.is_large else None
        stacks[each.name] = put_table(xp.concatenate(parts), layout, is_large=each.is_large)
    return stacks


def as_stacks(tables: Mapping[str, tuple[Array, ...]], config: CollectionConfig) -> dict[str, Any]:
    """The stacks made of given tables, such as pre-trained ones, in place of `init`.

    Args:
      tables: {feature name: k arrays [rows_j, width_j] of `param_dtype`}, as `qrhash.as_tables`
        takes them, of all features that have tables of their own.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, width]}, as from `init`.

    Raises:
      ValueError: a feature is missing or unknown, or a table has another shape or dtype.
    """
    config = as_collection_config(config)
    stacks = stack(tables, config)
    for each in config.stacks:
        made = stacks[each.name]
        dtype = jax.dtypes.canonicalize_dtype(made.dtype)
        if (made.shape, dtype) != (each.shape, each.dtype):
            raise ValueError(
                f"tables must stack up to {each.dtype} {each.shape} in {each.name!r}, got "
                f"{dtype} {made.shape}."
            )
        if not each.is_large:
            stacks[each.name] = put_table(made, each.layout, is_large=False)
    return stacks


def _check_alike(stack: Stack, parts: Sequence[Any]) -> None:
    """Raises a ValueError unless the tables of a stack are alike but for their rows."""
    kinds = [(part.shape[1:], jax.dtypes.canonicalize_dtype(part.dtype)) for part in parts]
    for span, (shape, dtype) in zip(stack.spans, kinds, strict=True):
        if (shape, dtype) != kinds[0]:
            first = stack.spans[0]
            raise ValueError(
                f"tables[{span.feature!r}][{span.table}] must be of width and dtype of the other "
                f"tables in stack {stack.name!r}, {kinds[0][1]} {kinds[0][0]} of "
                f"tables[{first.feature!r}][{first.table}], got {dtype} {shape}."
            )
