"""Combining: the k rows of an id -> one vector.

The operations of Shi et al. 2020, section 4, on rows z_1, ..., z_k gathered from k tables:

    add       e = z_1 + ... + z_k
    mult      e = z_1 * ... * z_k             (elementwise)
    concat    e = [z_1; ...; z_k]
    project   e = W [z_1; ...; z_k; z_1 * ... * z_k] + b
    path      e = M_k [... [M_2 [z_1; 1]; 1] ...; 1]      (z_2, ..., z_k are the maps M_2, ..., M_k)
    features  the k rows as they are, k vectors for one id

`project` keeps the rows narrow, so that the same memory holds more of them, and lets one small
matrix, shared by all ids of a feature, widen them to the vector. `path` sends the narrow row of one
table through an affine map that each of the others has for its class.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qrhash.types import Array

OPERATIONS = ("add", "mult", "concat", "project", "path", "features")


class Projection(NamedTuple):
    """The dense parameters of operation "project", shared by all ids of a feature.

    Attributes:
      kernel: W transposed, [num_inputs, features]. `num_inputs` is (k + 1) * width for k > 1
        rows of that width, and the row's width for k = 1.
      bias: b, [features], or None.
    """

    kernel: Any
    bias: Any = None


def combine(
    rows: Sequence[Array],
    operation: str,
    projection: Projection | Array | None = None,
) -> Any:
    """Combines the k rows of each id into its vector.

    Args:
      rows: k arrays [*shape, width_j] of one dtype, JAX's or NumPy's; equal widths but for "concat"
        and "path". For "path" the narrowest is the row that is mapped, the others, in their order,
        the maps, flat and row by row: [inputs + 1, outputs], in the last line what is added.
      operation: "add", "mult", "concat", "project", "path" or "features".
      projection: for "project" alone, its `Projection` or just the kernel.

    Returns:
      Vectors [*shape, features]; features is the common width, for "concat" the sum of the
      widths, for "project" the kernel's, for "path" the outputs of the last map. For "features"
      [*shape, k, features].

    Raises:
      ValueError: unknown operation, no rows, a projection missing or out of place, or shapes
        that do not fit together.

    Source: Shi et al. 2020, section 4: operation-based and path-based compositional embeddings, and
    the generation of features.

    >>> q, r = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> combine((q, r), "mult").tolist(), combine((q, r), "concat").tolist()
    ([3.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    >>> swapped_plus_ten = jnp.array([0.0, 1.0, 1.0, 0.0, 10.0, 10.0])
    >>> combine((swapped_plus_ten, r), "path").tolist()
    [14.0, 13.0]
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}.")
    if not rows:
        raise ValueError("rows must hold the rows of at least one table, got none.")
    check_projection(projection, operation)
    _check_rows(rows, operation)
    # Rows of the host stay there, in 64 bits, as ids do.
    xp = np if all(isinstance(row, np.ndarray) for row in rows) else jnp
    if operation == "concat":
        return xp.concatenate(rows, axis=-1)
    if operation == "features":
        return xp.stack(rows, axis=-2)
    if operation == "path":
        return _along_path(rows)
    if operation == "add":
        return functools.reduce(operator.add, rows)
    product = functools.reduce(operator.mul, rows)
    if operation == "mult":
        return product
    inputs = xp.concatenate((*rows, product), axis=-1) if len(rows) > 1 else product
    check_projection(projection, operation, num_inputs=inputs.shape[-1])
    kernel, bias = as_projection(projection)
    vectors = inputs @ kernel
    return (
        vectors if bias is None else vectors + xp.expand_dims(bias, tuple(range(vectors.ndim - 1)))
    )


class Map(NamedTuple):
    """The affine maps that a table's rows are, for operation "path".

    Attributes:
      table: number of the table.
      num_inputs: entries that a map takes; its row has as many lines, and one that is added.
      num_outputs: entries that it gives.
    """

    table: int
    num_inputs: int
    num_outputs: int


def path_of(widths: Sequence[int]) -> tuple[int, tuple[Map, ...]]:
    """The way of operation "path" through tables of these widths.

    Returns:
      The number of the table whose rows are mapped, the narrowest, and the maps of the others.

    Raises:
      ValueError: a table has no rows that are maps of what comes before.

    >>> path_of((36, 8))
    (1, (Map(table=0, num_inputs=8, num_outputs=4),))
    """
    first = widths.index(min(widths))
    size, maps = widths[first], []
    for table, width in enumerate(widths):
        if table == first:
            continue
        outputs, rest = divmod(width, size + 1)
        if rest or not outputs:
            raise ValueError(
                f"widths for 'path' must be those of maps [inputs + 1, outputs] beside the "
                f"narrowest, multiples of {size} + 1 after {size} entries, got "
                f"{width} in {tuple(widths)}."
            )
        maps.append(Map(table, size, outputs))
        size = outputs
    return first, tuple(maps)


def _along_path(rows: Sequence[Array]) -> Any:
    first, maps = path_of([row.shape[-1] for row in rows])
    vector = rows[first]
    for table, inputs, outputs in maps:
        lines = rows[table].reshape(*vector.shape[:-1], inputs + 1, outputs)
        # No matrix product: the sum is fused with the gather, and maps are never written down.
        vector = (vector[..., None] * lines[..., :-1, :]).sum(axis=-2) + lines[..., -1, :]
    return vector


def projection_shape(operation: str, widths: Sequence[int], features: int) -> Any:
    """Shape [num_inputs, features] of the kernel of "project"; None for the others."""
    if operation != "project":
        return None
    return (sum(widths) + (widths[0] if len(widths) > 1 else 0), features)


def as_projection(projection: Any) -> Projection:
    """A projection, also from just its kernel."""
    return projection if isinstance(projection, Projection) else Projection(projection)


def check_projection(
    projection: Any,
    operation: str,
    *,
    num_inputs: int | None = None,
    features: int | None = None,
) -> None:
    """Raises a ValueError unless the projection is there for "project", and of that shape."""
    if operation != "project":
        if projection is not None:
            raise ValueError(
                f"projection goes with operation 'project' alone, got one with {operation!r}."
            )
        return
    if projection is None:
        raise ValueError(
            "projection is missing: operation 'project' widens rows by its `Projection`, as from "
            "qrhash.init_projection, and was called without one."
        )
    kernel, bias = as_projection(projection)
    got = getattr(kernel, "shape", None)
    wanted = f"[{num_inputs or 'num_inputs'}, {features or 'features'}]"
    if (
        got is None
        or len(got) != 2
        or any(
            want not in (None, size) for want, size in zip((num_inputs, features), got, strict=True)
        )
    ):
        raise ValueError(f"projection must have a kernel of shape {wanted}, got {got or kernel!r}.")
    if bias is not None and getattr(bias, "shape", None) != got[1:]:
        raise ValueError(
            f"projection must have a bias of shape {got[1:]} beside a kernel of shape {got}, got "
            f"{getattr(bias, 'shape', bias)}."
        )


def _check_rows(rows: Sequence[Array], operation: str) -> None:
    """Raises a ValueError unless the rows go together: nothing is broadcast."""
    shapes = [tuple(row.shape) for row in rows]
    if operation in ("concat", "path"):
        if any(not shape or shape[:-1] != shapes[0][:-1] for shape in shapes):
            raise ValueError(f"rows must have shapes [*shape, width_j], got {shapes}.")
    elif any(not shape or shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"rows must have one shape [*shape, width] for {operation!r}, got {shapes}."
        )
