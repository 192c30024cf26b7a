"""Options: fields of a dataclass, each with its help and the values that it may have.

`Annotated[int, Option("Model", "Number of layers.", least=1)]` is the one place where an option has
its type, help and bounds: the command line and the configuration file are both made from it.
"""

import difflib
import functools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from qrhash.ctr.errors import UserError

_T = TypeVar("_T")

PANELS = ("Data", "Embeddings", "Model", "Training", "Devices", "Output")


class Option(NamedTuple):
    """What the command line says of an option, and its least and greatest values."""

    panel: str
    help: str
    least: float = -math.inf
    most: float = math.inf


# To evaluate the annotations of a class takes longer than to make one of its options.
_type_hints: Callable[..., dict[str, Any]] = functools.cache(get_type_hints)


def options_of(kind: type) -> Iterator[tuple[str, Any, Option]]:
    """(name, type, option) of every field that is an option."""
    for name, annotation in _type_hints(kind, include_extras=True).items():
        if get_origin(annotation) is Annotated:
            yield name, *get_args(annotation)


def offered(kind: type) -> list[tuple[str, Any, Any, Option]]:
    """(name, type, default, option) of every option, as a command line offers it."""
    defaults = {each.name: each.default for each in fields(kind)}
    return [(name, of, defaults[name], option) for name, of, option in options_of(kind)]


def build(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """Options of these values; raises a UserError for one that is unknown."""
    known = _type_hints(kind)
    unknown = [name for name in values if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; is it {near[0]!r}?" if near else "."
        raise UserError(f"Unknown option {unknown[0]!r} in {where}{hint}")
    return kind(**{name: as_meant(value, known[name]) for name, value in values.items()})


def as_meant(value: Any, kind: Any) -> Any:
    """A value of a configuration file, as an option of this type has it.

    A list is a tuple, and an integer is text where text is wanted: the option may be numbers such
    as "10,100", of which there is one.
    """
    if isinstance(value, list):
        return tuple(value)
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return str(value) if type(value) is int and str in kinds and int not in kinds else value


def bytes_of(text: str) -> int | None:
    """A number of bytes, of a text such as 64MB, 1.5 GiB or 5000000; None for any other.

    >>> bytes_of("64MB"), bytes_of("1.5 GiB"), bytes_of("much")
    (64000000, 1610612736, None)
    """
    match = re.fullmatch(r"([\d_]*\.?\d+) *([KMGT]?)(I?)B?", text.strip(), flags=re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        return None
    base = 1024 if match[3] else 1000
    size = float(match[1].replace("_", "")) * base ** " KMGT".index(match[2].upper() or " ")
    return int(size) if math.isfinite(size) else None


def check_values(settings: Any) -> None:
    """Holds every option against its type and its least value."""
    for name, kind, option in options_of(type(settings)):
        value = getattr(settings, name)
        if not _fits(value, kind):
            raise UserError(f"{name} must be {_describe(kind)}, got {value!r}.")
        if isinstance(value, (int, float)) and not option.least <= value <= option.most:
            bound = f"least {option.least}" if value < option.least else f"most {option.most}"
            raise UserError(f"{name} must be at {bound}, got {value}.")


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return _describe(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return "a list of integers"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[kind]


def split_names(text: str | None) -> list[str]:
    """The names in an option such as "a,b"."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def widths(name: str, text: str) -> tuple[int, ...]:
    """Layer widths, written as in the paper: "512-256-64"."""
    parts = text.split("-") if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{name} must be positive widths such as 512-256-64, got {text!r}.")
    return tuple(int(part) for part in parts)
