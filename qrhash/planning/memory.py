"""What embeddings take of a device's memory: tables, optimizer state and padding.

On a mesh a large table is split by rows, the last shard padded; tables of one width stand in one
stack, which is padded once (`qrhash.layout`, `qrhash.spans`). Small tables and projections are on
every device.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qrhash.config import EmbedConfig
from qrhash.fields import require_choice
from qrhash.spans import stacks_of

# Optimizer -> its numbers for each entry of a table, and for each row.
OPTIMIZERS = {"sgd": (0, 0), "adagrad": (1, 0), "rowwise_adagrad": (0, 1), "adam": (2, 0)}

# Projections are dense parameters, for which two numbers each are counted, as Adam has them.
_OF_DENSE = 2


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
        by_entry, by_row = OPTIMIZERS[self.optimizer]
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
        return num_params * self.itemsize * _OF_DENSE

    def tables(self, config: EmbedConfig) -> int:
        """Tables and projection of a config, without state."""
        return config.num_params * self.itemsize

    def state(self, config: EmbedConfig) -> int:
        """The optimizer's state for them."""
        in_tables = sum(self.state_of_tables(rows, width) for rows, width in config.table_shapes)
        return int(in_tables + self.state_of_dense(_num_dense(config)))

    def per_device(self, configs: Mapping[str, EmbedConfig]) -> int:
        """Of all of them with their state, on each device, padding included."""
        total = sum(self.of_dense(_num_dense(config)) for config in configs.values())
        for stack in stacks_of(configs):
            rows, width = stack.shape
            rows = -(-rows // self.devices) if stack.is_large else rows
            total += self.of_tables(rows, width)
        return int(total)


def _num_dense(config: EmbedConfig) -> int:
    """Parameters besides the tables."""
    return config.num_params - sum(rows * width for rows, width in config.table_shapes)
