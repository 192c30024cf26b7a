"""Settings and vocabulary sizes -> one EmbedConfig for each column of categories or lists.

A column is compressed by rows or by bytes. `collisions` = c means the same for every family: of
the n ids of a column, c share each row of the largest table, which has ceil(n / c) rows, and the
other tables, if the family has any, tell them apart. So the tables have about n / c rows together,
but never fewer than the family's balanced ones, the fewest there can be. What that is in bytes
goes by the operation: "concat" has rows of half the width, "project" of a quarter.

`compression` = x means that all embeddings together have x times fewer bytes than full tables,
whatever the operation. Columns that are not compressed are paid first, and so are the projections;
the others share the rest in proportion to their full tables.

Columns without a vocabulary have tables of digits of their keys, whatever was met, which they share
(`pools`): `key_bits` and `num_tables` give their sizes, and neither of the amounts above has a
meaning there. Or they have rows that keys get as they come (`room`).

Ids are numbered by falling frequency, and the largest table is indexed by id mod ceil(n / c):
the ids that share a row are far apart, a frequent one with rare ones. Measured on Criteo, that
is better than id // c, by which neighbours share it (the paper's layout, in which the quotients
are the large table).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from qrhash import (
    ChineseRemainder,
    EmbedConfig,
    FullTable,
    KeyDigits,
    MeshLayout,
    MixedRadix,
    Partition,
)
from qrhash.arithmetic import ceil_div, ceil_root
from qrhash.budget import partition_of
from qrhash.ctr.column_settings import (
    DEFAULT_COLLISIONS,
    DEFAULT_KEY_BITS,
    OF_LISTS,
    ColumnSettings,
)
from qrhash.ctr.data.vocabulary import UNSEEN_ID, has_no_vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.pools import in_pool, pools
from qrhash.ctr.model.room import ColumnConfig, dynamic_configs, dynamic_tables, num_bytes, unsized
from qrhash.ctr.options import split_names
from qrhash.ctr.settings import Settings

# Options of a column's section that leave its embedding to the run's own options.
SHARED = frozenset({"min_count", "hash_size", "init_stddev", "kind", "ids", *OF_LISTS})

# Those with which a column of keys has tables of its own.
OF_KEYS = frozenset(
    {"key_bits", "num_tables", "operation", "widths", "init_stddev", "param_dtype", "use_bias"}
)

FULL_DTYPE = np.dtype("float32")  # of the full tables to compare with


def embed_configs(
    settings: Settings, sizes: Mapping[str, int | None], layout: MeshLayout | None = None
) -> dict[str, ColumnConfig]:
    """The embeddings of a model.

    Args:
      settings: the options of the run.
      sizes: column name -> number of ids; None, if it takes keys.
      layout: how large tables are split over devices.

    Returns:
      {column name: config}, without the columns that are dropped. See `tables_of` for those that
      share a table.

    Raises:
      UserError: a column cannot have the embedding that its options ask for; or all together
        cannot be compressed as far as asked for.
    """
    columns: dict[str, _Column] = {}
    configs: dict[str, EmbedConfig] = {}
    of_keys: dict[str, EmbedConfig] = {}
    growing: list[str] = []
    items = split_names(settings.items)
    for name, size in sizes.items():
        section, options = settings.columns.get(name, {}), settings.column(name)
        if size is None:
            if options.partition == "drop":
                continue
            if options.is_dynamic:
                growing.append(name)
            else:
                own = _of_keys(name, settings.features, options)
                is_shared = OF_KEYS.isdisjoint(section)
                of_keys[name] = in_pool(own, name, int(name in items)) if is_shared else own
            continue
        is_named = has_own(section)
        if not is_named and size <= settings.threshold:
            options = replace(options, partition="full")
        if options.partition == "drop":
            continue
        columns[name] = column = _Column(name, size, settings.features, options)
        if not options.is_sized_by_bytes:
            configs[name] = column.by_rows(may_be_full=not is_named)
        elif "compression" in section:
            assert options.compression is not None  # What sized by bytes means.
            configs[name] = column.of_bytes(column.full_bytes / options.compression)
    # A run of partition full or drop is a baseline: nothing in it need be compressed.
    is_baseline = settings.partition in ("full", "drop")
    if len(configs) < len(columns) or (settings.compression is not None and not is_baseline):
        configs |= _of_bytes_in_all(settings, columns, configs)
    configs |= of_keys
    placed: dict[str, ColumnConfig] = {
        name: replace(config, large_table_rows=settings.large_table_rows, layout=layout)
        for name, config in configs.items()
    }
    placed |= dynamic_configs(settings, growing, layout)
    return {
        name: replace(placed[name], combiner=settings.column(name).combiner)
        for name in sizes
        if name in placed
    }


def has_own(section: Mapping[str, Any]) -> bool:
    """Whether a section of the settings says what its column's embedding is."""
    said = {name for name, value in section.items() if (name, value) != ("partition", "auto")}
    return not SHARED.issuperset(said)


def _of_keys(name: str, features: int, options: ColumnSettings) -> EmbedConfig:
    """Tables that every key has its rows in."""
    bits = options.key_bits or DEFAULT_KEY_BITS
    try:
        digits = KeyDigits(bits, options.num_tables)
        return EmbedConfig(
            digits, features, options.combined_by, widths=options.widths, **unsized(options)
        )
    except ValueError as error:
        raise UserError(f"Column {name}, keys of {bits} bits: {error}") from error


def tables_of(
    configs: Mapping[str, ColumnConfig],
) -> list[ColumnConfig]:
    """The configs of columns: of those that share a table one."""
    sharing = {name for _, *others in pools(configs).values() for name in others}
    fixed = [
        config
        for name, config in configs.items()
        if isinstance(config, EmbedConfig) and name not in sharing
    ]
    return [*fixed, *dynamic_tables(configs)]


class _Column(NamedTuple):
    """A categorical column of the model.

    Attributes:
      name: its name.
      size: number of ids.
      features: width of the vectors.
      options: what the settings say of it.
    """

    name: str
    size: int
    features: int
    options: ColumnSettings

    @property
    def full_bytes(self) -> int:
        """The bytes of a full table."""
        return self.size * self.features * FULL_DTYPE.itemsize

    @property
    def projection_bytes(self) -> int:
        """The bytes of the parameters besides the tables, if it is compressed."""
        with self._named():
            config = self._config(self._of_rows(self._fewest_rows))
        in_tables = sum(rows * width for rows, width in config.table_shapes)
        return num_bytes(config) - in_tables * config.param_dtype.itemsize

    def by_rows(self, *, may_be_full: bool) -> EmbedConfig:
        """With as many ids to a row as the options say.

        Args:
          may_be_full: whether to take a full table if it has no more rows.
        """
        with self._named():
            partition = self._partition()
            if may_be_full and sum(partition.num_rows) >= self.size:
                partition = FullTable(self.size)
            return self._config(partition)

    def of_bytes(self, budget: float) -> EmbedConfig:
        """With the tables that so many bytes allow."""
        with self._named():
            single = self.options.family == "hash-trick"
            options = self._unsized
            if self.options.widths is not None:
                options["widths"] = self.options.widths
            try:
                return EmbedConfig.fit(
                    self.size,
                    self.features,
                    "mult" if single else self.options.combined_by,
                    num_bytes=max(1, math.floor(budget)),
                    family=lambda _, rows: self._of_rows(rows),
                    **options,
                )
            except ValueError:
                # Of few ids the maps of "path" are more than the budget, as wide as `fit` has them.
                smallest = self.smallest()
                if num_bytes(smallest) > budget:
                    raise
                return smallest

    def smallest(self) -> EmbedConfig:
        """With about as few bytes as the family can have; a full table, if that takes no more.

        Balanced tables have the fewest rows, but of "path" those of the shorter ones are long.
        """
        with self._named():
            doubled = math.ceil(math.log2(self.size / self._fewest_rows)) + 1
            rows = (min(self.size, self._fewest_rows << j) for j in range(doubled))
            partitions = [FullTable(self.size), *map(self._of_rows, rows)]
            return min(map(self._config, partitions), key=num_bytes)

    @property
    def _unsized(self) -> dict[str, Any]:
        """What of its config does not go by its size.

        Where all categories of the training lines have an id, that of all others is never trained:
        its vector is zeros, not what others have made of the rows that it would share with them.
        """
        is_trained = self.options.min_count > 1 or has_no_vocabulary(self.options)
        return unsized(self.options) | ({} if is_trained else {"padding_id": UNSEEN_ID})

    def _config(self, partition: Partition) -> EmbedConfig:
        # A single table is its own vector: nothing to combine or to project.
        combined = partition.num_tables > 1
        return EmbedConfig(
            partition,
            self.features,
            self.options.combined_by if combined else "mult",
            widths=self.options.widths if combined else None,
            **self._unsized,
        )

    def _partition(self) -> Partition:
        options = self.options
        if options.family == "full":
            return FullTable(self.size)
        if options.radices is not None:
            return MixedRadix(self.size, options.radices)
        if options.moduli is not None:
            return ChineseRemainder(self.size, options.moduli)
        collisions = DEFAULT_COLLISIONS if options.collisions is None else options.collisions
        if collisions == 0 and options.family == "hash-trick":
            raise ValueError("the hash trick needs collisions of at least 1, got 0.")
        rows = ceil_div(self.size, max(1, collisions))
        # More ids to a row than this, and the other tables would be the longer ones.
        return self._of_rows(self._fewest_rows if collisions == 0 else rows)

    @property
    def _fewest_rows(self) -> int:
        """Rows of the largest table, when there are fewest in all."""
        if self.options.family == "hash-trick":
            return 1
        return ceil_root(self.size, self._num_tables)

    @property
    def _num_tables(self) -> int:
        return 2 if self.options.family == "quotient-remainder" else self.options.num_tables

    def _of_rows(self, rows: int) -> Partition:
        """The family's partition with so many rows in the largest table."""
        return partition_of(self.options.family, self.size, rows, self._num_tables)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the core, with the column they are about."""
        try:
            yield
        except ValueError as error:
            raise UserError(f"Column {self.name}, {self.size} ids: {error}") from error


def _of_bytes_in_all(
    settings: Settings, columns: Mapping[str, _Column], configs: Mapping[str, EmbedConfig]
) -> dict[str, EmbedConfig]:
    """The columns without configs: with what the others leave of the bytes of all columns."""
    assert settings.compression is not None
    budget = sum(column.full_bytes for column in columns.values()) / settings.compression
    left = budget - sum(map(num_bytes, configs.values()))
    others = {name: column for name, column in columns.items() if name not in configs}
    smallest = {name: column.smallest() for name, column in others.items()}
    projections = {name: column.projection_bytes for name, column in others.items()}
    least = budget - left + sum(map(num_bytes, smallest.values()))
    if least > budget:
        raise too_few_bytes(settings, budget, least)
    while others:
        tables = left - sum(projections[name] for name in others)
        share = tables / sum(column.full_bytes for column in others.values())
        wanted = {
            name: share * column.full_bytes + projections[name] for name, column in others.items()
        }
        fixed = {name for name in others if wanted[name] <= num_bytes(smallest[name])}
        if not fixed:
            return smallest | {name: each.of_bytes(wanted[name]) for name, each in others.items()}
        # What cannot be as small as its share leaves less to the others.
        left -= sum(num_bytes(smallest[name]) for name in fixed)
        others = {name: column for name, column in others.items() if name not in fixed}
    return smallest


def too_few_bytes(settings: Settings, budget: float, least: float) -> UserError:
    """What to raise where `compression` allows fewer bytes than the embeddings can have."""
    other = "" if settings.is_planned else "or for another operation, "
    return UserError(
        f"compression={settings.compression} allows the embeddings {budget:,.0f} bytes, but the "
        f"smallest ones take {least:,.0f}: ask for less, {other}or let shorter columns be "
        f"compressed too, by a threshold below {settings.threshold}."
    )
