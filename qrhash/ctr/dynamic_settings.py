"""The options of tables that grow: rows for keys that earn them, while keys come and go."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from qrhash.arithmetic import MOST_KEYS
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import Option, bytes_of
from qrhash.ctr.tower_settings import TWO_TOWER

# In a column's section: it does not share the run's table.
NOT_DYNAMIC = "none"

# What a table that grows is made of: all columns of a shared one have the same.
OF_DYNAMIC = ("admit_after", "newcomers", "evict_after")

_embeddings = partial(Option, "Embeddings")


class Room(NamedTuple):
    """How much a table that grows may take: one of the two.

    Attributes:
      rows: how many keys can have a row of their own.
      num_bytes: or how many bytes all of it may have.
    """

    rows: int | None
    num_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class DynamicColumnOptions:
    """What a table that grows takes, be it of one column or of all."""

    dynamic: Annotated[
        str | None,
        _embeddings(
            "Take keys as they come, and give a row of its own to each that is met often enough: "
            "so many rows, such as 100000, or as many as so much memory has room for, such as "
            "64MB (of rows, compressed vectors and index, on one device). All columns share them; "
            f"in a column's section, rows of its own, or '{NOT_DYNAMIC}'."
        ),
    ] = None
    admit_after: Annotated[
        int,
        _embeddings("--dynamic: how often a key is met before it has a row of its own.", least=1),
    ] = 2
    newcomers: Annotated[
        Literal["compressed", "zeros"],
        _embeddings(
            "--dynamic: what vector a key has until then: one from a few small tables, which its "
            "row then starts as; or zeros."
        ),
    ] = "compressed"
    evict_after: Annotated[
        int | None,
        _embeddings(
            "--dynamic: take rows back from keys not met for so many steps. Default: once seven "
            "eighths of the rows are taken, from those not met for longest.",
            least=1,
        ),
    ] = None

    @property
    def is_dynamic(self) -> bool:
        """Whether keys get rows as they come."""
        return self.dynamic not in (None, NOT_DYNAMIC)


@dataclass(frozen=True, kw_only=True)
class DynamicOptions:
    """What all tables that grow have in common."""

    evict_every: Annotated[
        int,
        _embeddings("--dynamic: steps from one look for rows to take back to the next.", least=1),
    ] = 100
    cache_rows: Annotated[
        int | None,
        _embeddings(
            "--dynamic: how many of the rows are on the device, those in use; all others, with the "
            "optimizer's state of them, are in the host's memory, and come when they are met. "
            "Default: all are on the device.",
            least=1,
        ),
    ] = None
    store: Annotated[
        str | None,
        _embeddings(
            "--cache-rows: a directory, on whose disk the other rows are, not in the memory: in a "
            "file that is gone when the run is over."
        ),
    ] = None


def room(text: str) -> Room:
    """How much a text such as "100_000" or "64MB" allows.

    Raises:
      UserError: it does not read so, or allows nothing.
    """
    plain = text.strip().replace("_", "").replace(",", "")
    rows = int(plain) if plain.isdecimal() else None
    num_bytes = bytes_of(text) if plain[-1:].isalpha() else None
    if rows is not None and rows > MOST_KEYS:
        raise UserError(f"dynamic must be at most {MOST_KEYS:,} rows, got {text!r}.")
    if not (rows or num_bytes):
        raise UserError(
            "dynamic must be a number of rows such as 100000, or of bytes such as 64MB or 1.5GiB, "
            f"above 0, got {text!r}."
        )
    return Room(rows, num_bytes)


def check_dynamic(settings: Any, columns: Mapping[str, Any]) -> None:
    """Raises a UserError if options of tables that grow do not fit each other.

    Args:
      settings: the options of the run.
      columns: those of each column that has a section.
    """
    if settings.is_dynamic:
        room(settings.dynamic)
    is_any = settings.is_dynamic or any(column.is_dynamic for column in columns.values())
    for name in (*OF_DYNAMIC, "evict_every", "cache_rows"):
        default = getattr(type(settings), name)
        if not is_any and getattr(settings, name) != default:
            raise UserError(f"{name} goes with dynamic, which is not given.")
    if settings.is_dynamic:
        for name in ("hash_size", "compression", "collisions"):
            if getattr(settings, name) is not None:
                raise UserError(
                    f"{name} goes with ids from a vocabulary, not with dynamic, whose tables take "
                    "keys as they come."
                )
    if settings.store is not None and settings.cache_rows is None:
        raise UserError("store goes with cache_rows, which is not given.")
    if settings.cache_rows is not None:
        _check_cache(settings, columns)
    for name, column in columns.items():
        section = settings.columns[name]
        if not column.is_dynamic:
            unfit = [option for option in OF_DYNAMIC if option in section]
            if unfit:
                raise UserError(f"columns.{name}: {unfit[0]} goes with dynamic.")
            continue
        room(column.dynamic)
        if "dynamic" in section and {"ids", "hash_size"} & section.keys():
            raise UserError(f"columns.{name}: dynamic, ids and hash_size are three ways: give one.")
        made_of = (*OF_DYNAMIC, "operation", "key_bits", "num_tables", "widths", "init_stddev")
        unfit = [option for option in (*made_of, "param_dtype", "use_bias") if option in section]
        if "dynamic" not in section and unfit:
            raise UserError(
                f"columns.{name}: {unfit[0]} is the same for all columns that share the table of "
                "--dynamic; give the column rows of its own, by dynamic in its section."
            )


def _check_cache(settings: Any, columns: Mapping[str, Any]) -> None:
    """Raises a UserError unless rows can be in a store: of one table, on one device."""
    own = [name for name, column in columns.items() if "dynamic" in settings.columns[name]]
    if any(columns[name].is_dynamic for name in own) or not settings.is_dynamic:
        raise UserError(
            "cache_rows goes with the one table that all columns of --dynamic share; leave dynamic "
            "out of the sections of columns."
        )
    if settings.mesh is not None:
        raise UserError("cache_rows goes with one device, not with a mesh.")
    if settings.model == TWO_TOWER:
        raise UserError(f"cache_rows goes with the models of clicks, not with {TWO_TOWER!r}.")
    if settings.dense_updates:
        raise UserError("cache_rows goes with training by rows, not with dense_updates.")
    if settings.store is not None and not Path(settings.store).is_dir():
        raise UserError(f"store must be a directory, got {settings.store!r}.")
