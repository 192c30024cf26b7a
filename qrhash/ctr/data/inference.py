"""What the columns of a table are used as: by their types, their first rows, and the options.

Floats are numbers and text is a category. An integer is a category if its name says so, if it is
too large to be a count, or if there are few of them. What does not help is left out, with a reason.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.data import cells
from qrhash.ctr.data.schema import Column, Holds, Schema, Use
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from qrhash.ctr.tower_settings import NO_LABEL, TWO_TOWER

SAMPLE_ROWS = 8192
LABELS = {"label", "labels", "click", "clicks", "clicked", "is_click", "is_clicked", "isclick"}
LABELS |= {"clk", "target", "y", "response", "converted", "conversion"}

_MOST_SHOWN = 20  # columns in a sentence
_FEW = 100  # distinct integers that are a category
_LARGE = 2**31  # an integer that is no count
_READABLE = 0.99  # share of a column's cells that say what it holds
_LABELS_OK = 0.9  # share of labels that are to be 0 or 1

_OF_IDS = {"id", "ids", "uid", "uuid", "guid", "hash", "hashed", "code", "zip", "zipcode"}
_OF_IDS |= {"postcode", "type", "category", "categories", "cat", "key", "token", "class", "kind"}
_JOINED = re.compile(
    "(user|item|ad|movie|product|session|device|site|app|page|campaign|video|song|artist|book"
    "|store|shop|brand|cate|customer|client|query|doc|category|publisher|advertiser|creative)id$"
)
_INDEX = re.compile("unnamed(: )?[0-9]+|__index_level_[0-9]+__", flags=re.IGNORECASE)


class _Seen(NamedTuple):
    """What the first rows say of a column.

    Attributes:
      holds: what kind of values.
      distinct: how many different ones.
      present: how many cells are not missing.
      largest: the largest absolute value of integers.
      is_whole: of numbers that are no integers by their type: whether they all are by value.
      has_gaps: whether cells are missing.
    """

    holds: Holds
    distinct: int
    present: int
    largest: int = 0
    is_whole: bool = False
    has_gaps: bool = False


def infer(fields: Mapping[str, pa.DataType], sample: pa.Table, settings: Settings) -> Schema:
    """The schema of a table.

    Args:
      fields: column name -> its type; text, in a file of text.
      sample: the first rows.
      settings: the options, which win.

    Raises:
      UserError: an option names a column that is not there, or one that cannot be used so; the
        label is not to be told, or is not 0 or 1; no category is left.
    """
    named = _named(settings, list(fields))
    seen = {}
    for name in fields:
        found = _look(sample[name].combine_chunks())
        seen[name] = found._replace(has_gaps=found.present < sample.num_rows)
    label = _label(fields, named, settings)
    columns = []
    for name, kind in fields.items():
        use, reason = _use(name, seen[name], named, label, settings.time)
        holds = seen[name].holds
        _check_use(name, str(kind), seen[name], use, sample[name])
        shown = f"text: {holds}" if pa.types.is_string(kind) and holds != "text" else str(kind)
        columns.append(Column(name, shown, holds, use, reason))
    schema = Schema(
        columns=tuple(columns),
        positive_from=settings.positive_from,
        all_positive=label is None,
    )
    if label is not None:
        _check_label(label, sample[label], schema)
    if not schema.categories:
        raise UserError(
            "No column is a category, and embeddings are all that this trains: name some with "
            f"--categories, of {listed(n for n in fields if n != label)}."
        )
    return schema


def check_sections(settings: Settings, schema: Schema) -> None:
    """Raises a UserError if a section of the options is of no category of the data."""
    uses = {column.name: column.use for column in schema.columns}
    for name, kind in settings.kinds.items():
        if name not in uses:
            raise UserError(f"columns.{name}: the data have no such column, but {listed(uses)}.")
        if uses[name] != kind:
            raise UserError(
                f"columns.{name}: in the Criteo format this column is used as {uses[name]}, and "
                "has no section; --preset table makes it what the section says."
            )


def _named(settings: Settings, names: list[str]) -> dict[str, Use]:
    """Column -> its use, of those that the options name."""
    found: dict[str, tuple[Use, str]] = {}

    def name_one(name: str, use: Use, option: str) -> None:
        if name not in names:
            raise UserError(f"{option}: there is no column {name!r}, but {listed(names)}.")
        if name in found:
            raise UserError(f"{option}: column {name!r} is named by {found[name][1]} already.")
        found[name] = (use, option)

    if settings.label is not None and not settings.has_no_label(names):
        name_one(settings.label, "label", "--label")
    if settings.time is not None:
        name_one(settings.time, "time", "--time")
    uses = {"numbers": "number", "categories": "category", "ignore": "ignored"}
    for option, use in uses.items():
        for name in split_names(getattr(settings, option)):
            name_one(name, cast(Use, use), f"--{option}")
    for name, kind in settings.kinds.items():
        if name in names:
            if name in found and found[name][0] == kind:
                continue
            name_one(name, cast(Use, kind), f"columns.{name}")
    return {name: use for name, (use, _) in found.items()}


def split_names(text: str | None) -> list[str]:
    """The names in an option such as "a,b"."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _label(fields: Mapping[str, Any], named: Mapping[str, Use], settings: Settings) -> str | None:
    if settings.has_no_label(fields):
        return None
    given = [name for name, use in named.items() if use == "label"]
    found = given or [n for n in fields if n.lower() in LABELS and n not in named]
    if len(found) != 1:
        why = "no column is named as one" if not found else f"it could be {' or '.join(found)}"
        every = f"; or say --label {NO_LABEL}, if every row is a positive one"
        raise UserError(
            f"Which column is the label? {why.capitalize()}; name it with --label NAME, of "
            f"{listed(fields)}{every if settings.model == TWO_TOWER else ''}."
        )
    return found[0]


def _use(
    name: str, seen: _Seen, named: Mapping[str, Use], label: str | None, time: str | None
) -> tuple[Use, str]:
    """What a column is used as, and why."""
    if name == label:
        return "label", "" if named.get(name) else "by its name"
    if name in named:
        return named[name], "" if named[name] in ("time", "label") else "as the options say"
    if _INDEX.fullmatch(name):
        return "ignored", "the index of a data frame, by its name"
    if seen.holds in ("nested", "nothing"):
        rule = {"nested": "this type is not read", "nothing": "there is nothing in it"}
        return "ignored", rule[seen.holds]
    if seen.distinct < 2 and seen.present > 1 and not seen.has_gaps:
        return "ignored", f"one value in the first {seen.present:,} rows"
    if seen.holds == "time":
        return "ignored", "a time; --time splits by it"
    if seen.holds == "text":
        return "category", _alone(name, seen).removeprefix("; ")
    if seen.holds == "boolean":
        return "category", ""
    if seen.holds == "number":
        # What a data frame makes of integers beside missing ones.
        is_id = seen.is_whole and _is_id(name)
        return ("category", "whole numbers, by its name") if is_id else ("number", "")
    return _use_of_integers(name, seen)


def _use_of_integers(name: str, seen: _Seen) -> tuple[Use, str]:
    if _is_id(name):
        return "category", "by its name" + _alone(name, seen)
    if seen.largest >= _LARGE:
        return "category", "too large for a count" + _alone(name, seen)
    # In a short table a handful of values is a count as likely as not.
    if seen.distinct <= min(_FEW, seen.present // 2):
        return "category", f"{seen.distinct} values in the first rows"
    return "number", ""


def _alone(name: str, seen: _Seen) -> str:
    """A hint, where there is nothing to learn of a category because no row shares it."""
    is_alone = seen.distinct == seen.present >= _FEW
    return f"; another one in every row: --ignore {name}?" if is_alone else ""


def _is_id(name: str) -> bool:
    words = re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])", name)
    return any(word.lower() in _OF_IDS for word in words) or bool(_JOINED.search(name.lower()))


def _check_use(name: str, kind: str, seen: _Seen, use: Use, column: pa.ChunkedArray) -> None:
    """Raises a UserError if a column cannot be used so."""
    fitting: dict[str, tuple[str, ...]] = {
        "label": ("integer", "number", "boolean", "text"),
        "number": ("integer", "number", "boolean", "nothing"),
        "category": ("integer", "number", "boolean", "text", "time", "nothing"),
        "time": ("time", "integer"),
    }
    if use == "ignored":
        return
    holds = seen.holds
    is_float = use == "category" and holds == "number" and not _is_text(column.type)
    is_float = is_float and not seen.is_whole
    is_stamp = use == "category" and not _is_text(column.type) and holds == "time"
    if holds in fitting[use] and not is_float and not is_stamp:
        return
    shown = ", ".join(cells.quote(each) for each in _some(column))
    wanted = {
        "label": "labels, 0 and 1",
        "number": "numbers",
        "category": "integers or text",
        "time": "timestamps, dates, integers, or text such as 2024-01-31 12:00:00",
    }
    hint = ""
    if is_float:
        hint = "; write integers with missing cells as nullable ones (Int64 in pandas)"
    raise UserError(
        f"Column {name} has type {kind} and cannot be used as {use}, which takes {wanted[use]}: "
        f"it holds {shown or 'nothing'}{hint}."
    )


def _check_label(label: str, column: pa.ChunkedArray, schema: Schema) -> None:
    """Raises a UserError if many of the first labels are not what they must be."""
    array = column.combine_chunks()
    try:
        _, bad = cells.labels(label, array, schema.positive_from)
    except UserError:
        bad = np.ones(len(array), bool)
    if not len(bad) or bad.mean() <= 1 - _LABELS_OK:
        return
    shown = ", ".join(cells.quote(each) for each in _some(column)) or "nothing"
    values, unreadable = cells.labels(label, array, -np.inf)
    hint = "it must be 0 or 1, or true or false"
    if unreadable.mean() <= 1 - _LABELS_OK and len(values):
        hint += "; --positive-from X makes a click of a label of at least X"
    raise UserError(f"The label {label} holds {shown}: {hint}.")


def _look(column: pa.Array) -> _Seen:
    column = cells.plain(column)
    kind = column.type
    if cells.is_a(kind, "nested", "duration", "time", "interval") or isinstance(
        kind, pa.BaseExtensionType
    ):
        return _Seen("nested", 0, 0)
    present = column.drop_null()
    if pa.types.is_string(kind):
        present = present.filter(pc.not_equal(present, ""))
    distinct = present.unique()
    if not len(distinct):
        return _Seen("nothing", 0, 0)
    if pa.types.is_string(kind):
        return _look_at_text(present, distinct)
    if cells.is_a(kind, "integer"):
        ends = pc.min_max(distinct).as_py()
        largest = max(abs(ends["min"]), abs(ends["max"]))
        return _Seen("integer", len(distinct), len(present), largest)
    holds = "nested"
    for held, names in {
        "text": ("binary",),
        "number": ("floating", "decimal"),
        "boolean": ("boolean",),
        "time": ("timestamp", "date"),
    }.items():
        if cells.is_a(kind, *names):
            holds = held
    is_whole = pa.types.is_floating(kind) and not cells.keys("", distinct)[1].any()
    return _Seen(cast(Holds, holds), len(distinct), len(present), is_whole=is_whole)


def _look_at_text(present: pa.Array, distinct: pa.Array) -> _Seen:
    """Of cells of text: what nearly all of them say."""
    is_missing = pc.is_in(present, pa.array(cells.NO_NUMBER))
    telling = present.filter(pc.invert(is_missing))
    counts = (len(distinct), len(present))
    if not len(telling):
        return _Seen("text", *counts)

    def share(pattern: str) -> float:
        trimmed = pc.utf8_trim_whitespace(telling)
        found = pc.match_substring_regex(trimmed, pattern, ignore_case=True)
        return float(np.mean(found.to_numpy(zero_copy_only=False)))

    if share(cells.CANONICAL) >= _READABLE:
        whole = pc.match_substring_regex(distinct, cells.CANONICAL)
        largest = max(abs(int(text)) for text in distinct.filter(whole).to_pylist())
        return _Seen("integer", *counts, largest)
    # Leading zeros are no number's: those of codes.
    if share(cells.DECIMAL) >= _READABLE and share("^[+-]?0[0-9]") < 1 - _READABLE:
        return _Seen("number", *counts, is_whole=share(cells.WHOLE) == 1)
    if share("^(true|false)$") >= _READABLE:
        return _Seen("boolean", *counts)
    _, bad = cells.times("", telling)
    is_time = bad.mean() <= 1 - _READABLE and share(cells.INTEGER) < 1 - _READABLE
    return _Seen("time" if is_time else "text", *counts)


def _is_text(kind: pa.DataType) -> bool:
    return cells.is_a(kind, "string", "large_string", "string_view", "dictionary")


def _some(column: pa.ChunkedArray) -> list[Any]:
    """A few values of a column."""
    values = column.slice(0, 1000).drop_null().to_pylist()
    return list({str(value): value for value in values}.values())[:5]


def listed(names: Iterable[str]) -> str:
    """Names of columns in a sentence, not more than fit in."""
    every = list(names)
    more = f" and {len(every) - _MOST_SHOWN} more" if len(every) > _MOST_SHOWN else ""
    return ", ".join(every[:_MOST_SHOWN]) + more
