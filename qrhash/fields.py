"""What the fields of a config may be: each checked, and brought into the form that it keeps."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import as_size
from qrhash.layout import MeshLayout
from qrhash.operations import path_of
from qrhash.partitions import Partition


def default_widths(
    operation: str, features: int, partition: Partition, largest: int = 0
) -> tuple[int, ...]:
    """The default widths; or, if the largest table is to have at least one width, by that."""
    k = partition.num_tables
    narrow = min(largest, features) or max(1, features // 4)
    if operation == "project":
        return (narrow,) * k
    if operation == "path" and k > 1:
        # The longest table has the rows, the others maps of as many outputs as a row has entries.
        first = partition.num_rows.index(max(partition.num_rows))
        maps = [(narrow + 1) * narrow] * (k - 2) + [(narrow + 1) * features]
        return (*maps[:first], narrow, *maps[first:])
    if operation != "concat":
        return (features,) * k
    if features < k:
        raise ValueError(
            f"features must be at least one per table for 'concat', got "
            f"features={features} for {k} tables."
        )
    even = [features // k + (j < features % k) for j in range(k)]
    place = partition.num_rows.index(max(partition.num_rows))
    if k == 1 or even[place] >= largest:
        return tuple(even)
    wide = min(largest, features - (k - 1))
    others = [
        (features - wide) // (k - 1) + (j < (features - wide) % (k - 1)) for j in range(k - 1)
    ]
    return (*others[:place], wide, *others[place:])


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def require_bool(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is true or false."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be true or false, got {value!r}.")


def require_probability(name: str, value: Any) -> None:
    """Raises a ValueError unless a value is a number in (0, 1)."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}.")


def as_float_dtype(name: str, value: Any) -> np.dtype:
    """A floating-point dtype; raises a ValueError for anything else."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    # To NumPy, None is float64.
    if value is None or dtype is None:
        raise ValueError(f"{name} must be a floating-point dtype, got {value!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point dtype, got {dtype}.")
    return dtype


def checked_widths(
    given: Any, operation: str, features: int, partition: Partition
) -> tuple[int, ...]:
    """The width of each table; None: the default ones."""
    if given is None:
        return default_widths(operation, features, partition)
    try:
        widths = tuple(as_size(f"widths[{j}]", w) for j, w in enumerate(given))
    except TypeError:
        raise ValueError(f"widths must be a tuple of sizes, got {given!r}.") from None
    if len(widths) != partition.num_tables:
        raise ValueError(
            f"widths must hold one width per table, {partition.num_tables}, got {widths}."
        )
    if operation == "concat" and sum(widths) != features:
        raise ValueError(f"widths must sum to features={features} for 'concat', got {widths}.")
    if operation in ("add", "mult", "features") and set(widths) != {features}:
        raise ValueError(f"widths must all be features={features} for {operation!r}, got {widths}.")
    if operation == "path":
        first, maps = path_of(widths)
        outputs = maps[-1].num_outputs if maps else widths[first]
        if outputs != features:
            raise ValueError(
                f"widths must lead to features={features} for 'path', got {widths}, whose last map "
                f"has {outputs} outputs."
            )
    if operation == "project" and len(set(widths)) > 1:
        raise ValueError(f"widths must be equal for 'project', got {widths}.")
    return widths


def checked_padding_id(given: Any, num_embeddings: int) -> int | None:
    """The padding id as an integer."""
    if given is None:
        return None
    try:
        padding_id = operator.index(given)
    except TypeError:
        padding_id = -1
    if isinstance(given, bool) or not 0 <= padding_id < num_embeddings:
        raise ValueError(
            f"padding_id must be an id in [0, {num_embeddings}), or None, got {given!r}."
        )
    return padding_id


def checked_init(given: Any, init_stddev: float | None, num_tables: int) -> Any:
    """The initializer, or a tuple of one per table."""
    inits = tuple(given) if isinstance(given, list) else given
    if isinstance(inits, tuple) and len(inits) != num_tables:
        raise ValueError(
            f"embedding_init must hold one initializer per table, {num_tables}, got {len(inits)}."
        )
    for init in inits if isinstance(inits, tuple) else (inits,):
        if init is not None and not callable(init):
            raise ValueError(f"embedding_init must be a Flax initializer, got {init!r}.")
    if init_stddev is not None and not 0 < float(init_stddev) < float("inf"):
        raise ValueError(f"init_stddev must be positive and finite, got {init_stddev}.")
    if init_stddev is not None and inits is not None:
        raise ValueError(
            "init_stddev scales the default initializer and has no meaning beside "
            f"embedding_init, got {init_stddev} and {inits!r}."
        )
    return inits


def as_axes(given: Any) -> tuple[str | None, str | None] | None:
    """Names of a table's two axes, or None."""
    if given is None:
        return None
    axes = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(axes) != 2 or not all(axis is None or isinstance(axis, str) for axis in axes):
        raise ValueError(f"logical_axes must be two names or None, got {given!r}.")
    return axes


def check_layout_of(
    layout: Any, shapes: Sequence[tuple[int, int]], are_large: Sequence[bool]
) -> None:
    """Raises a ValueError unless the large ones of the tables can be laid out so."""
    if layout is None:
        return
    if not isinstance(layout, MeshLayout):
        raise ValueError(f"layout must be a qrhash.MeshLayout, got {layout!r}.")
    for (rows, width), is_large in zip(shapes, are_large, strict=True):
        if is_large:
            layout.array_shape(rows, width)


def without_init(config: Any) -> dict[str, Any]:
    """The fields of a config but for `embedding_init`, or a ValueError if there is one."""
    if config.embedding_init is not None:
        raise ValueError(
            "embedding_init must be None in JSON, which holds no functions, got "
            f"{config.embedding_init!r}: leave it out with dataclasses.replace, and give it to "
            "from_dict."
        )
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del values["embedding_init"]
    return values


def as_plain(value: Any) -> Any:
    """The value of a field as JSON has it."""
    if isinstance(value, (Partition, MeshLayout)):
        return value.to_dict()
    if isinstance(value, np.dtype):
        return value.name
    return list(value) if isinstance(value, tuple) else value
