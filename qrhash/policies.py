"""Id policies: what an id outside the vocabulary, and the padding id, turn into.

    "raise"   an error        "nan"    a vector of NaN       "zero"   a vector of zeros
    "clip"    the nearest id  "wrap"   id mod num_embeddings

Of keys (`qrhash.key_families`) every one has rows, and no policy has a say.

"clip" and "wrap" move an id before its row numbers are computed. Under the others it keeps none:
its row number is `num_rows[j]`, one past the end, in every table. The padding id has -1.
"""

from typing import Any

import numpy as np

from qrhash.arithmetic import INT32_MAX, Array, as_ids
from qrhash.partitions import Partition
from qrhash.words import Keys

ID_POLICIES = ("raise", "nan", "zero", "clip", "wrap")

PADDING = -1  # row number of the padding id, in every table


def indices_of(
    ids: Array | Keys, partition: Partition, policy: str, padding_id: int | None
) -> tuple[Array, ...]:
    """Row numbers of ids after a policy: see `EmbedConfig.indices`."""
    if partition.takes_keys:
        return _indices_of_keys(Keys.of(ids), partition, padding_id)
    if isinstance(ids, Keys):
        raise ValueError(
            f"ids must be integers in [0, {partition.num_embeddings}) for {partition}, got Keys: "
            "choose a family on keys, KeyDigits or MultiHash, or number the keys first."
        )
    moved = _within_vocabulary(as_ids(ids), partition, policy)
    is_padding = _is_padding(moved, padding_id)
    xp = moved.__array_namespace__()
    if is_padding is not None:
        moved = xp.where(is_padding, 0, moved)
    indices = partition.indices(moved)
    if policy == "raise":
        _check_ids(moved, indices[0] < partition.num_rows[0], partition)
    if is_padding is None:
        return indices
    return tuple(xp.where(is_padding, PADDING, index) for index in indices)


def _indices_of_keys(keys: Keys, partition: Partition, padding_id: int | None) -> tuple[Array, ...]:
    """Every key has rows: no policy has anything to decide, but for the padding."""
    indices = partition.indices(keys)
    if padding_id is None:
        return indices
    is_padding = keys == padding_id
    xp = indices[0].__array_namespace__()
    return tuple(xp.where(is_padding, xp.int32(PADDING), index) for index in indices)


def fill_value(first: Array, policy: str, padding_id: int | None, dtype: Any) -> Any:
    """What the vectors of ids without rows hold, given their first row numbers [*shape].

    A number; or [*shape, 1], where some are zeros, of the padding id, and others NaN.
    """
    if policy == "zero":
        return 0.0
    if padding_id is None:
        return np.nan
    # Under the other policies nothing else has no row.
    if policy != "nan":
        return 0.0
    xp = first.__array_namespace__()
    return xp.where(first == PADDING, 0.0, xp.nan).astype(dtype)[..., None]


def fill_kind(policy: str, padding_id: int | None) -> str:
    """Which of its values `fill_value` gives, by name."""
    if policy == "nan" and padding_id is not None:
        return "both"
    return str(fill_value(np.zeros(0, np.int32), policy, padding_id, None))


def _is_padding(ids: Array, padding_id: int | None) -> Array | None:
    """Where ids are the padding id; None if none can be."""
    if padding_id is None or padding_id > np.iinfo(ids.dtype).max:
        return None
    return ids == padding_id


def _within_vocabulary(ids: Array, partition: Partition, policy: str) -> Array:
    """Ids after the policies that move an id; the others leave it outside, without rows."""
    n = partition.num_ids_with_rows
    if ids.dtype.itemsize < 8 and n - 1 > INT32_MAX:
        return ids  # Too narrow for the vocabulary, which `Partition.indices` refuses.
    if policy == "clip":
        return ids.clip(0, n - 1)
    if policy == "wrap":
        # n itself need not fit the ids' dtype where n - 1, then all ones in binary, does.
        return ids & (n - 1) if n & (n - 1) == 0 else ids % n
    return ids


def _check_ids(ids: Array, has_rows: Array, partition: Partition) -> None:
    """Policy "raise"."""
    if not isinstance(ids, np.ndarray):
        import jax  # not needed where tables are only looked up, by NumPy
        from jax.experimental import checkify

        if isinstance(ids, jax.core.Tracer):
            if ids.size:
                first = ids.reshape(-1)[has_rows.argmin()]
                checkify.check(has_rows.all(), f"id {{id}} has no row in {partition}", id=first)
            return
        # Constants of a jitted function are concrete, what is computed of them there is not.
        ids = np.asarray(ids)
        has_rows = partition.indices(ids)[0] < partition.num_rows[0]
    bad = np.argwhere(~has_rows)
    if len(bad):
        position = tuple(bad[0].tolist())
        raise ValueError(
            f"{len(bad)} of {ids.size} ids have no row in {partition}, the first is "
            f"{ids[position]} at position {position}. Correct the ids, or choose another "
            "id_policy ('nan', 'zero', 'clip', 'wrap')."
        )
