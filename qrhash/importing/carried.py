"""What is carried over: a config, and tables of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qrhash.config import EmbedConfig
from qrhash.dynamic import DynamicConfig, Parameters, State
from qrhash.export import Exported, of_dynamic, of_feature
from qrhash.operations import Projection


@dataclass(frozen=True)
class Carried:
    """An embedding of ids.

    Attributes:
      config: its `EmbedConfig`.
      tables: its tables, NumPy arrays [rows_j, width_j]; `qrhash.as_tables` places them.
      projection: for operation "project".
      slots: name -> what an optimizer kept of each table, [rows_j, ...], as it was found.
    """

    config: EmbedConfig
    tables: tuple[np.ndarray, ...]
    projection: Projection | None = None
    slots: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def exported(self) -> Exported:
        """The embedding as `qrhash.export.save` takes it."""
        return of_feature(self.config, self.tables, self.projection)


@dataclass(frozen=True)
class CarriedKeys:
    """An embedding of keys that come and go.

    Attributes:
      config: its `DynamicConfig`.
      parameters: its `Parameters`.
      state: its `State`, with counts and last steps where there were such.
      version: of the training it is from: one more than its last step.
    """

    config: DynamicConfig
    parameters: Parameters
    state: State
    version: int

    def exported(self) -> Exported:
        """The embedding as `qrhash.export.save` takes it."""
        return of_dynamic(self.config, self.parameters, self.state, self.version)


def as_table(name: str, array: Any) -> np.ndarray:
    """An array as a table of float32, [rows, width].

    Raises:
      ValueError: it has another number of axes, or no floats.
    """
    array = np.asarray(array)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} must be floats [rows, width], got {array.dtype} {array.shape}.")
    return array.astype(np.float32, copy=False)
