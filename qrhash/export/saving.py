"""What a snapshot is made of, where the model was trained, and the file.

The file is there once it is whole, under its name: a new snapshot takes the place of an old one
while that is read.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qrhash import __version__
from qrhash.collection import unstack
from qrhash.config import EmbedConfig
from qrhash.dynamic.collections import parameters_in
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.deltas import delta_since, nothing_published
from qrhash.dynamic.embedding import Parameters, State
from qrhash.export.header import NAME, Header, checksum
from qrhash.export.row_formats import ROW_FORMATS, encode
from qrhash.fields import require_choice
from qrhash.kinds import whole_table
from qrhash.operations import Projection, as_projection
from qrhash.stacks import CollectionConfig, as_collection_config
from qrhash.tables import check_parameters

# Of an `EmbedConfig`, what a look-up goes by.
_FIELDS = ("features", "operation", "widths", "id_policy", "padding_id", "combiner", "pool_rows")


@dataclass(frozen=True)
class Exported:
    """An embedding as a snapshot has it.

    Attributes:
      said: what is fixed about it, as JSON has it.
      tables: name -> [rows, width], kept in the format of the rows.
      arrays: name -> any other array, kept as it is.
    """

    said: Mapping[str, Any]
    tables: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def of_feature(
    config: EmbedConfig, tables: Any, projection: Projection | Any | None = None
) -> Exported:
    """The embedding of one feature.

    Args:
      config: its `EmbedConfig`.
      tables: its tables, as `qrhash.init` gives them, on whatever devices.
      projection: for operation "project".

    Raises:
      ValueError: tables or projection have not the shapes of the config.
    """
    check_parameters(tables, config, projection)
    return Exported(
        said=_said(config),
        tables={f"table_{j}": whole_table(table) for j, table in enumerate(tables)},
        arrays=_arrays_of(projection),
    )


def of_collection(
    config: CollectionConfig | Mapping[str, Any],
    stacks: Mapping[str, Any],
    projections: Mapping[str, Any] | None = None,
    *,
    states: Mapping[str, State] | None = None,
    version: int | None = None,
) -> dict[str, Exported]:
    """The embeddings of many features; tables that features share are kept once.

    Args:
      config: the `CollectionConfig`.
      stacks: the stacked tables, as `qrhash.collection.init` gives them.
      projections: of the features with operation "project".
      states: with dynamic features their states, as `qrhash.dynamic.init_states` gives them.
      version: and how many steps are done, see `of_dynamic`.

    Raises:
      ValueError: a stack is missing, or has another shape; or with dynamic features states or
        version are missing.
    """
    config = as_collection_config(config)
    tables, projections = unstack(stacks, config), projections or {}
    composites, exported = config.composites, dict[str, Exported]()
    configs, owner_of = config.configs, config.owner_of
    for name, value in config.embeddings:
        owner = owner_of[name]
        if name not in composites:
            said = _said(configs[name]) | {"owner": owner}
            is_own = isinstance(value, EmbedConfig)
            given = tables[owner], projections.get(owner)
            exported[name] = of_feature(value, *given) if is_own else Exported(said, {}, {})
        elif not isinstance(value, DynamicConfig):
            exported[name] = of_crossed(owner, None, composites[name].combiner)
        elif states is None or name not in states or version is None:
            raise ValueError(
                f"states and version must be given with dynamic features, those of {name!r} are "
                "missing."
            )
        else:
            parameters = parameters_in(stacks, config, name, projections)
            exported[name] = of_dynamic(value, parameters, states[name], version)
    return exported


def of_dynamic(
    config: DynamicConfig, parameters: Parameters, state: State, version: int
) -> Exported:
    """The embedding of keys that come and go: the keys that have a row, and the compressed vectors.

    Args:
      config: its `DynamicConfig`.
      parameters: its `Parameters`.
      state: its `State`.
      version: how many steps are done; deltas since then can be applied to the snapshot, see
        `qrhash.dynamic.delta_since`.

    Raises:
      ValueError: steps were trained beyond the version.
    """
    delta, _ = delta_since(nothing_published(config), parameters, state, config, version)
    order = np.argsort(delta.keys)
    refused = config.refused
    said = {
        "features": config.features,
        "combiner": config.combiner,
        "version": version,
        "refused": None if refused is None else _said(refused),
        "refused_value": config.refused_value,
    }
    tables = {"table": delta.vectors[order]}
    tables |= {f"refused/table_{j}": table for j, table in enumerate(delta.refused)}
    arrays = {f"refused/{name}": array for name, array in _arrays_of(delta.projection).items()}
    return Exported(said, tables, arrays | {"keys": delta.keys[order]})


def of_crossed(name: str, key: Any, combiner: str) -> Exported:
    """Keys of a table that several features share, each crossed with a key of its feature.

    Args:
      name: of the table's embedding in the snapshot.
      key: of the feature, `qrhash.Keys` []: a key is looked up as `qrhash.cross(key, keys)`; None:
        as it is.
      combiner: how the vectors of a bag become one.
    """
    number = None if key is None else int(key.to_numpy())
    return Exported({"table": name, "key": number, "combiner": combiner}, {}, {})


def save(
    path: str | Path, embeddings: Exported | Mapping[str, Exported], *, rows: str = "float32"
) -> None:
    """Writes a snapshot, a file of safetensors.

    Args:
      path: of the file; one that is there is replaced, once the new one is whole.
      embeddings: name -> embedding, as from `of_feature`, `of_collection` and `of_dynamic`; or one,
        which then has the name "".
      rows: how rows are kept: "float32", "bfloat16", "int8" or "int4".

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
      ValueError: an unknown format, no embedding, or rows that are not finite and would be kept as
        whole numbers.
    """
    from safetensors.numpy import save_file

    require_choice("rows", rows, ROW_FORMATS)
    if isinstance(embeddings, Exported):
        embeddings = {"": embeddings}
    if not embeddings:
        raise ValueError("embeddings must hold one embedding or more, got none.")
    path = Path(path)
    said: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, each in embeddings.items():
        said[name] = {"owner": name} | dict(each.said)
        for table, array in each.tables.items():
            for part, kept in _encoded(f"{name}/{table}", array, rows).items():
                arrays[f"{name}/{table}/{part}"] = kept
        arrays |= {f"{name}/{of}": np.ascontiguousarray(a) for of, a in each.arrays.items()}
    checksums = {name: checksum(array) for name, array in arrays.items()}
    whole = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        said_of_all = {NAME: Header(__version__, said, checksums).to_json()}
        save_tensors(partial(save_file, metadata=said_of_all), arrays, whole)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def save_tensors(
    save_file: Callable[[Any, Path], Any], arrays: Mapping[str, Any], path: Path
) -> None:
    """Writes a file of safetensors, for whoever may read what else this user writes.

    Args:
      save_file: of the library, which leaves its files to their owner alone.
      arrays: name -> array.
      path: where to.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path)
    path.chmod(mode)


def _encoded(name: str, table: Any, rows: str) -> dict[str, np.ndarray]:
    try:
        return encode(np.asarray(table), rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _said(config: EmbedConfig) -> dict[str, Any]:
    """What a look-up goes by, as JSON has it."""
    return {name: getattr(config, name) for name in _FIELDS} | {
        "partition": config.partition.to_dict()
    }


def _arrays_of(projection: Any) -> dict[str, np.ndarray]:
    if projection is None:
        return {}
    parts = as_projection(projection)._asdict()
    return {
        name: np.asarray(array, np.float32) for name, array in parts.items() if array is not None
    }
