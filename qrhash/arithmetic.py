"""Integer arithmetic on ids and table sizes: exact, on NumPy and JAX integers alike."""

import dataclasses
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

# NumPy or JAX integer arrays; this module and the partitions stay free of either's types.
Array = Any

INT32_MAX = 2**31 - 1
MOST_KEYS = 2**29  # of an index: slots are at least twice as many, a power of two in an int32

_SEARCH_BUDGET = 20_000


def as_ids(ids: Array, name: str = "ids") -> Array:
    """Integers as an array in which the arithmetic on ids of any vocabulary can be done.

    Args:
      ids: NumPy or JAX integers, or Python integers, of any shape.
      name: what to call them in messages.

    Returns:
      The same values with 64 bits (NumPy) or at least 32 bits (JAX), signedness kept where it
      matters.

    Raises:
      ValueError: the ids are not integers.
      ValueError: integers of more than 64 bits, or lists that are no array.
    """
    if isinstance(ids, np.generic) or not hasattr(ids, "__array_namespace__"):
        ids = _as_numpy(ids)
    if ids.dtype == object:
        ids = _integers_of(ids)
    xp = ids.__array_namespace__()
    if not xp.isdtype(ids.dtype, "integral"):
        hint = ": number other keys first" if name == "ids" else ""
        raise ValueError(f"{name} must be integers, got an array of {ids.dtype}{hint}.")
    if isinstance(ids, np.ndarray):
        return ids if ids.dtype == np.uint64 else ids.astype(np.int64)
    return ids if ids.dtype.itemsize >= 4 else ids.astype(xp.int32)


def _as_numpy(values: Any) -> Array:
    """Python integers, or lists of them, as NumPy's; those it takes for floats stay objects."""
    try:
        array = np.asarray(values)
        if array.size == 0 and isinstance(values, (list, tuple)):
            return array.astype(np.int64)
        # Of integers that no integer type has room for together, NumPy makes floats.
        lists = isinstance(values, (list, tuple)) and array.dtype == np.float64
        return np.asarray(values, dtype=object) if lists else array
    except ValueError as error:
        raise ValueError(
            f"ids must be an array, or lists of equal lengths, got {values!r}."
        ) from error


def _integers_of(objects: np.ndarray) -> np.ndarray:
    """An array of Python objects as one of 64 bits, if they are integers that fit."""
    for value in objects.flat:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"ids must be integers, got {value!r} of {type(value).__name__}.")
    numbers = [int(value) for value in objects.flat]
    dtype = np.dtype(np.uint64 if min(numbers) >= 0 else np.int64)
    if misfit := [x for x in numbers if not np.iinfo(dtype).min <= x <= np.iinfo(dtype).max]:
        raise ValueError(
            f"ids must fit {dtype}, got {misfit[0]}: no vocabulary has ids of 2**63 or more."
        )
    return np.array(numbers, dtype).reshape(objects.shape)


def digit(ids: Array, place: int, radix: int, num_embeddings: int) -> Array:
    """floor(id / place) mod radix, leaving out what changes no id below num_embeddings.

    That also keeps constants wider than the ids' dtype out of the arithmetic.
    """
    if place >= num_embeddings:
        return ids * 0
    quotient = ids // place if place > 1 else ids
    return quotient % radix if place * radix < num_embeddings else quotient


def multiply_mod(values: Array, factor: int, modulus: int) -> Array:
    """Computes values * factor mod modulus for values in [0, modulus), without overflow."""
    if (modulus - 1) * factor <= np.iinfo(values.dtype).max:
        return values * factor % modulus
    xp = values.__array_namespace__()

    def add(a: Array, b: Array) -> Array:
        excess = a - (modulus - b)
        return xp.where(excess < 0, excess + modulus, excess)

    total = values * 0
    for bit in f"{factor:b}":
        total = add(total, total)
        if bit == "1":
            total = add(total, values)
    return total


def ceil_div(a: int, b: int) -> int:
    """The smallest integer not below a / b."""
    return -(-a // b)


def ceil_root(n: int, k: int) -> int:
    """The smallest r with r**k >= n."""
    root = round(n ** (1 / k))
    while root**k < n:
        root += 1
    while root > 1 and (root - 1) ** k >= n:
        root -= 1
    return root


def balanced_radices(n: int, k: int) -> tuple[int, ...]:
    """The k numbers of smallest sum whose product is at least n.

    Of all numbers with one sum, those that differ by at most one have the largest product, so
    only r and r - 1 can occur.
    """
    root = ceil_root(n, k)
    smaller = max(s for s in range(k) if (root - 1) ** s * root ** (k - s) >= n)
    return (root - 1,) * smaller + (root,) * (k - smaller)


def coprime_moduli(n: int, k: int) -> tuple[int, ...]:
    """The k pairwise coprime numbers whose product is at least n, of smallest sum."""
    best = min((_coprime_from_root(n, k, used) for used in range(1, k + 1)), key=sum)
    budget = _SEARCH_BUDGET

    def search(chosen: tuple[int, ...], needed: int) -> None:
        # Chosen from the largest down; `needed` is what the others' product must reach.
        nonlocal best, budget
        left = k - len(chosen)
        if needed == 1:
            chosen, left = chosen + (1,) * left, 0
        if left == 0:
            best = chosen
            return
        for modulus in itertools.count(ceil_root(needed, left)):
            rest = ceil_div(needed, modulus)
            fewest = sum(chosen) + modulus
            fewest += sum(balanced_radices(rest, left - 1)) if left > 1 else 0
            descends = not chosen or modulus < chosen[-1]
            if budget <= 0 or fewest >= sum(best) or not descends:
                return
            budget -= 1
            if all(math.gcd(modulus, other) == 1 for other in chosen):
                search((*chosen, modulus), rest)

    search((), n)
    return best[::-1]


def _coprime_from_root(n: int, k: int, used: int) -> tuple[int, ...]:
    """Coprime numbers, of which `used` count up from the root and the others are 1."""
    moduli: tuple[int, ...] = ()
    candidates = itertools.count(ceil_root(n, used))
    while len(moduli) < used:
        candidate = next(candidates)
        if all(math.gcd(candidate, modulus) == 1 for modulus in moduli):
            moduli = (candidate, *moduli)
    return moduli + (1,) * (k - used)


def as_size(name: str, value: Any, minimum: int = 1) -> int:
    """The value as a Python integer, or a ValueError that names it."""
    rule = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be {rule}, got {value!r}.")
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be {rule}, got {value!r}.") from None
    if size < minimum:
        raise ValueError(f"{name} must be {rule}, got {value!r}.")
    return size


def as_fields(name: str, values: Any) -> dict[str, Any]:
    """What `to_dict` made of an object, as a dictionary of its own; or a ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping, as to_dict gives it, got {values!r}.")
    return dict(values)


def build(kind: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """A dataclass of these values, or a ValueError that names those it has not or lacks."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(f"{kind.__name__} has {', '.join(fields)}, got {unknown[0]!r}.")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING
        if name not in values and not has_default:
            raise ValueError(f"{kind.__name__} needs {name!r}, got {', '.join(values) or 'none'}.")
    return kind(**values)


def typed_fields(value: Any) -> dict[str, Any]:
    """A frozen dataclass as JSON has it: its type, and its fields."""
    names = (field.name for field in dataclasses.fields(value) if field.init)
    values = {name: getattr(value, name) for name in names}
    lists = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {"type": type(value).__name__, **lists}


def build_typed(name: str, base: type, values: Any) -> Any:
    """The dataclass, of a type derived from `base`, that `typed_fields` made of it."""
    values = as_fields(name, values)
    types = {each.__name__: each for each in _subclasses(base) if not inspect.isabstract(each)}
    if values.get("type") not in types:
        raise ValueError(f"type must be one of {', '.join(types)}, got {values.get('type')!r}.")
    return build(types[values.pop("type")], values)


def _subclasses(kind: Any) -> Iterator[Any]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)
