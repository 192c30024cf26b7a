"""What embeddings take of a device's memory: tables, optimizer state and padding.

On a mesh a large table is split by rows, the last shard padded; tables of one width stand in one
stack, which is padded once (`qrhash.layout`, `qrhash.spans`). Small tables and projections are on
every device. Tables that grow are counted by themselves, as `qrhash train` has them, and have an
index of their keys, which is split over the devices as well.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qrhash.arithmetic import ceil_div
from qrhash.config import EmbedConfig
from qrhash.fields import require_choice
from qrhash.spans import stacks_of

# Optimizer -> the numbers kept for each entry of a table, for each row, and for each entry of a
# projection, a dense parameter, which Adam trains beside any optimizer of tables.
OPTIMIZERS = {
    "none": (0, 0, 0),
    "sgd": (0, 0, 2),
    "adagrad": (1, 0, 2),
    "rowwise_adagrad": (0, 1, 2),
    "adam": (2, 0, 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Sizes in bytes, by optimizer and devices.

    Attributes:
      optimizer: one of `OPTIMIZERS`.
      devices: how many devices the rows of large tables are split over.
      large_table_rows: see `EmbedConfig`.
      itemsize: bytes of an entry of a table, and of an optimizer's number for it. A number for a
        row has four.
    """

    optimizer: str
    devices: int
    large_table_rows: int
    itemsize: int

    def __post_init__(self) -> None:
        require_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))

    def of_tables(self, rows: Any, width: Any) -> Any:
        """Of tables of rows and a width, integers or arrays, with their state, on all devices."""
        return rows * width * self.itemsize + self.state_of_tables(rows, width)

    def state_of_tables(self, rows: Any, width: Any) -> Any:
        """The same of the optimizer's state alone."""
        by_entry, by_row, _ = OPTIMIZERS[self.optimizer]
        return rows * (width * self.itemsize * by_entry + 4 * by_row)

    def on_a_device(self, rows: Any, width: Any) -> Any:
        """Of a table with its state, on each device; without padding, so not whole numbers."""
        is_split = np.asarray(rows) >= self.large_table_rows
        return self.of_tables(rows, width) / np.where(is_split, self.devices, 1)

    def of_dense(self, num_params: Any) -> Any:
        """Of parameters besides the tables, with their state."""
        return num_params * self.itemsize + self.state_of_dense(num_params)

    def state_of_dense(self, num_params: Any) -> Any:
        """The same of the optimizer's state alone."""
        *_, by_dense = OPTIMIZERS[self.optimizer]
        return num_params * self.itemsize * by_dense

    def of_table(self, rows: int, width: int) -> int:
        """Of a table that stands alone, with its state, on each device, padding included."""
        is_split = rows >= self.large_table_rows
        return int(self.of_tables(ceil_div(rows, self.devices) if is_split else rows, width))

    def tables(self, config: Any) -> int:
        """Tables and projection of a config, without state."""
        num_params: int = config.num_params
        return num_params * self.itemsize

    def state(self, config: Any) -> int:
        """The optimizer's state for them."""
        in_tables = sum(self.state_of_tables(rows, width) for rows, width in _shapes(config))
        return int(in_tables + self.state_of_dense(_num_dense(config)))

    def index(self, config: Any) -> int:
        """The index of a table that grows, candidates included, on each device; 0 for others."""
        if isinstance(config, EmbedConfig):
            return 0
        # Loaded on first use: most plans have no such table.
        from qrhash.dynamic.index import shard_bytes

        shards = None if self.devices == 1 else self.devices
        return shard_bytes(config.capacity, config.admission, shards)

    def per_device(self, configs: Mapping[str, Any]) -> int:
        """Of all of them with their state, on each device, padding included."""
        total = sum(self.of_dense(_num_dense(config)) for config in configs.values())
        fixed = {n: each for n, each in configs.items() if isinstance(each, EmbedConfig)}
        for stack in stacks_of(fixed):
            rows, width = stack.shape
            rows = ceil_div(rows, self.devices) if stack.is_large else rows
            total += self.of_tables(rows, width)
        for config in configs.values():
            total += self.index(config)
            if not isinstance(config, EmbedConfig):
                total += sum(self.of_table(*shape) for shape in _shapes(config))
        return int(total)


def _shapes(config: Any) -> Iterator[tuple[int, int]]:
    """Rows and width of every table of a config."""
    if isinstance(config, EmbedConfig):
        yield from config.table_shapes
    else:
        yield from config.own.table_shapes
        yield from config.refused.table_shapes if config.refused else ()


def _num_dense(config: Any) -> int:
    """Parameters besides the tables."""
    num_params: int = config.num_params
    return num_params - sum(rows * width for rows, width in _shapes(config))
