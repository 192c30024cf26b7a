"""DeepRec's multi-hash and embedding variables, from the tensors of its checkpoints."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qrhash import dynamic
from qrhash.carried_families import DeepRecQuotientRemainder
from qrhash.config import EmbedConfig
from qrhash.dynamic import Delta, DynamicConfig
from qrhash.importing.carried import Carried, CarriedKeys, as_table
from qrhash.operations import OPERATIONS

_HASHED = re.compile(r"(?P<name>.+)/multhash_(?P<part>[QR])(?:/(?P<slot>.+))?$")
_OF_KEYS = re.compile(
    r"(?P<name>.+?)(?:/part_(?P<part>\d+))?-(?P<what>keys|values|freqs|versions)$"
)
_SLICED = re.compile(r"(?P<name>.+)/part_(?P<part>\d+)$")

_AROUND_ADAGRAD = r"(.+)/(Adagrad\w*|Adam\w*|Ftrl\w*|Momentum\w*)$"


def from_deeprec(
    arrays: Mapping[str, Any],
    *,
    operation: str = "add",
    num_embeddings: Mapping[str, int] | None = None,
) -> dict[str, Carried | CarriedKeys]:
    """The variables of a checkpoint of DeepRec.

    Args:
      arrays: tensor name -> array. Of a multi-hash variable `NAME/multhash_Q`, `NAME/multhash_R`
        and its slots; of an embedding variable `NAME-keys`, `NAME-values`, `NAME-freqs` and
        `NAME-versions`; of either also in parts, `/part_0` and so on.
      operation: of the multi-hash variables, which no checkpoint says: "add", "mult" or "concat".
      num_embeddings: name -> size of the vocabulary of a multi-hash variable; by default as many as
        its tables have rows for.

    Returns:
      {name: `Carried`} of multi-hash variables, by DeepRec's own arithmetic; {name: `CarriedKeys`}
      of embedding variables, in the order of the checkpoint, with nothing but zeros for other keys.

    Raises:
      ValueError: there is no variable, or one lacks a tensor; or two parts have the same key.
    """
    if operation not in OPERATIONS[:3]:
        raise ValueError(f"operation must be add, mult or concat, got {operation!r}.")
    carried: dict[str, Carried | CarriedKeys] = {}
    carried |= _multi_hash(_joined(arrays), operation, num_embeddings or {})
    carried |= _of_keys(arrays)
    if not carried:
        raise ValueError(
            "arrays must hold NAME/multhash_Q and NAME/multhash_R, or NAME-keys and NAME-values, "
            f"got {', '.join(list(arrays)[:8])}."
        )
    return carried


def _joined(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables that were cut into parts by rows, whole again."""
    parts: dict[str, dict[int, Any]] = defaultdict(dict)
    for name, array in arrays.items():
        found = _SLICED.match(name)
        parts[found["name"] if found else name][int(found["part"]) if found else 0] = array
    return {
        name: np.concatenate([np.asarray(of[part]) for part in sorted(of)])
        if len(of) > 1
        else np.asarray(next(iter(of.values())))
        for name, of in parts.items()
    }


def _multi_hash(
    arrays: Mapping[str, np.ndarray], operation: str, sizes: Mapping[str, int]
) -> dict[str, Carried]:
    found: dict[str, dict[str, dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for name, array in arrays.items():
        if match := _HASHED.match(name):
            found[match["name"]][match["slot"] or ""][match["part"]] = array
    carried = {}
    for name, by_slot in found.items():
        if missing := [part for part in "QR" if part not in by_slot[""]]:
            raise ValueError(f"{name}/multhash_{missing[0]} is not among the arrays.")
        tables = tuple(as_table(f"{name}/multhash_{part}", by_slot[""][part]) for part in "QR")
        (quotients, width), (remainders, other) = (table.shape for table in tables)
        size = sizes.get(name, quotients**2)
        partition = DeepRecQuotientRemainder(size, quotients, remainders)
        is_concat = operation == "concat"
        config = EmbedConfig(
            partition,
            width + other if is_concat else width,
            operation,
            widths=(width, other) if is_concat else None,
        )
        slots = {slot: (of["Q"], of["R"]) for slot, of in by_slot.items() if slot and len(of) == 2}
        carried[name] = Carried(config, tables, slots=slots)
    return carried


def _of_keys(arrays: Mapping[str, Any]) -> dict[str, CarriedKeys]:
    found: dict[str, dict[str, dict[int, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for name, array in arrays.items():
        match = _OF_KEYS.match(name)
        if match and not re.match(_AROUND_ADAGRAD, match["name"]):
            found[match["name"]][match["what"]][int(match["part"] or 0)] = np.asarray(array)
    carried = {}
    for name, of in found.items():
        if missing := [what for what in ("keys", "values") if what not in of]:
            raise ValueError(f"{name}-{missing[0]} is not among the arrays.")
        keys, values = _whole(of["keys"]), as_table(f"{name}-values", _whole(of["values"]))
        if len(keys) != len(values) or len(np.unique(keys)) < len(keys):
            raise ValueError(
                f"{name}-keys must be {len(values)} keys, each once, as there are values, got "
                f"{len(keys)}, {len(np.unique(keys))} of them distinct."
            )
        carried[name] = _keys_of(keys, values, of)
    return carried


def _keys_of(
    keys: np.ndarray, values: np.ndarray, of: Mapping[str, Mapping[int, np.ndarray]]
) -> CarriedKeys:
    counts, steps = (_numbers(of.get(what), len(keys)) for what in ("freqs", "versions"))
    steps = np.maximum(steps, 0)
    version = int(steps.max(initial=0)) + 1
    config = DynamicConfig(max(1, len(keys)), values.shape[1])
    params = dynamic.init(jax.random.key(0), config)
    everything = Delta(
        from_version=np.int64(-1),
        to_version=np.int64(version),
        keys=keys.astype(np.int64).view(np.uint64),
        vectors=values,
        counts=counts,
        last_steps=steps,
        removed=np.zeros(0, np.uint64),
    )
    served = dynamic.apply_delta(dynamic.nothing_served(params, config), everything, config)
    return CarriedKeys(config, served.parameters, served.state, version)


def _whole(parts: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([parts[part] for part in sorted(parts)])


def _numbers(parts: Mapping[int, np.ndarray] | None, count: int) -> np.ndarray:
    """Counts or steps [count] as int32; zeros, where none were kept."""
    whole = np.zeros(0) if parts is None else _whole(parts)
    if len(whole) != count:
        return np.zeros(count, np.int32)
    return np.clip(whole, 0, 2**31 - 1).astype(np.int32)
