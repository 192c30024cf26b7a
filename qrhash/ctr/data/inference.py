"""What the columns of a table are used as: by their types, their first rows, and the options.

Floats are numbers, text is a category, and lists are lists of categories. An integer is a category
if its name says so, if it is too large to be a count, or if there are few of them. What does not
help is left out, with a reason.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.data import cells, lists
from qrhash.ctr.data.column_names import is_id, is_index, is_label, is_time
from qrhash.ctr.data.decode import with_points
from qrhash.ctr.data.labels import check_label
from qrhash.ctr.data.looks import Seen, look
from qrhash.ctr.data.schema import Column, Schema, Use
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import split_names
from qrhash.ctr.settings import Settings
from qrhash.ctr.tower_settings import NO_LABEL, TWO_TOWER

SAMPLE_ROWS = 8192
_MOST_SHOWN = 20  # columns in a sentence
_FEW = 100  # distinct integers that are a category
_LARGE = 2**31  # an integer that is no count

_SINCE_1970 = 10**8  # seconds, in 1973; milliseconds and the like are more
_SINCE_2000 = 946_684_800  # seconds


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
    seen = {}
    for name in fields:
        found = look(sample[name].combine_chunks())
        seen[name] = found._replace(
            has_gaps=found.present < sample.num_rows,
            is_categorical=pa.types.is_dictionary(fields[name]),
        )
    named = _named(settings, seen)
    label = _label(fields, named, settings)
    columns = []
    for name, kind in fields.items():
        use, reason = _use(name, seen[name], named, label, settings.time)
        holds = seen[name].holds
        shown = lists.type_name(kind)
        _check_use(name, shown, seen[name], use, sample[name])
        is_told = pa.types.is_string(kind) and holds not in ("text", "nothing")
        shown = f"text: {holds}" if is_told else shown
        has_commas = seen[name].has_commas and use in ("label", "number", "weight")
        column = Column(name, shown, holds, use, reason, decimal_comma=has_commas)
        columns.append(_of_lists(column, kind, settings) if use == "list" else column)
    schema = Schema(
        columns=tuple(columns),
        positive=tuple(split_names(settings.positive)),
        positive_from=settings.positive_from,
        all_positive=label is None,
    )
    if label is not None:
        is_all = sample.num_rows < SAMPLE_ROWS
        check_label(label, with_points(sample, schema)[label], schema, is_all=is_all)
    if not schema.embedded:
        may_be = [n for n in fields if n != label and _can_be_category(n, seen[n], sample[n])]
        hint = f"name some with --categories, of {listed(may_be)}" if may_be else "none can be one"
        raise UserError(
            f"No column is a category, and embeddings are all that this trains: {hint}."
        )
    _check_lists(settings, schema)
    return schema


def _check_lists(settings: Settings, schema: Schema) -> None:
    """Raises a UserError if an option is of lists that there are not."""
    columns = schema.of_use("list")
    if settings.list_length is not None and not columns:
        raise UserError("--list-length goes with columns of lists, and none is used as one.")
    if settings.list_separator is not None and not any(each.separator for each in columns):
        raise UserError(
            "--list-separator cuts columns of text into lists, and none is used so: name them with "
            "--lists."
        )


def _of_lists(column: Column, kind: pa.DataType, settings: Settings) -> Column:
    """A column of lists, with what the options say of them."""
    options = settings.column(column.name)
    has_own = "separator" in settings.columns.get(column.name, {})
    separator = None
    if not lists.are_lists(kind) and (column.holds != "list" or has_own):
        separator = options.separator or lists.DEFAULT_SEPARATOR
    return replace(column, length=options.length, separator=separator)


def as_they_are_here(schema: Schema, sample: pa.Table, settings: Settings) -> Schema:
    """The schema of an earlier run, on data that may have its lists in another form.

    Lists of Arrow are read whatever the run had. Text is cut, though it was not, if none of it
    looks written as a list, and not cut, though it was, if all of it is.

    Args:
      schema: of the run; its columns of lists are in the sample.
      sample: the first rows of the data.
      settings: of the run; a separator that a column's section names stays.
    """
    columns = []
    for column in schema.columns:
        is_free = "separator" not in settings.columns.get(column.name, {})
        if column.use == "list" and is_free and _is_text(sample.schema.field(column.name).type):
            text = cells.plain(sample[column.name].combine_chunks()).drop_null()
            text = text.filter(pc.not_equal(pc.utf8_trim_whitespace(text), ""))
            separator = column.separator
            if separator is None and not lists.look_written(text):
                separator = settings.column(column.name).separator or lists.DEFAULT_SEPARATOR
            elif lists.are_written(text):
                separator = None
            column = replace(column, separator=separator)
        columns.append(column)
    return replace(schema, columns=tuple(columns))


def check_sections(settings: Settings, schema: Schema) -> None:
    """Raises a UserError if a section of the options is of no column that it could be of."""
    uses = {column.name: column.use for column in schema.columns}
    for name, kind in settings.kinds.items():
        if name not in uses:
            raise UserError(f"columns.{name}: the data have no such column, but {listed(uses)}.")
        if uses[name] not in ({"category", "list"} if kind is None else {kind}):
            raise UserError(
                f"columns.{name}: in the Criteo format this column is used as {uses[name]}, and "
                "has no section; --preset table makes it what the section says."
            )


def _named(settings: Settings, seen: Mapping[str, Seen]) -> dict[str, Use]:
    """Column -> its use, of those that the options name."""
    names = list(seen)
    found: dict[str, tuple[Use, str]] = {}

    def name_one(name: str, use: Use, option: str) -> None:
        if name not in names:
            is_numbered = re.fullmatch("column[0-9]+", name) and settings.header == "auto"
            hint = "; --header no, if the first line is none" if is_numbered else ""
            raise UserError(f"{option}: there is no column {name!r}, but {listed(names)}{hint}.")
        if name in found:
            raise UserError(f"{option}: column {name!r} is named by {found[name][1]} already.")
        found[name] = (use, option)

    def of_values(name: str) -> Use:
        return "list" if seen[name].holds == "list" else "category"

    if settings.label is not None and not _has_no_label(settings, names):
        name_one(settings.label, "label", "--label")
    if settings.time is not None:
        name_one(settings.time, "time", "--time")
    if settings.weight is not None:
        name_one(settings.weight, "weight", "--weight")
    uses = {"numbers": "number", "categories": "category", "lists": "list", "ignore": "ignored"}
    for option, use in uses.items():
        for name in split_names(getattr(settings, option)):
            name_one(name, cast(Use, use), f"--{option}")
    for name, kind in settings.kinds.items():
        if name in names:
            has_vectors = {"list", "category"} if kind is None else {kind}
            if name in found and found[name][0] in has_vectors:
                continue
            name_one(name, cast(Use, kind or of_values(name)), f"columns.{name}")
    if settings.model == TWO_TOWER:
        for name in split_names(settings.items):
            is_able = name in names and seen[name].holds in ("integer", "text", "boolean", "list")
            if is_able and name not in found:
                name_one(name, of_values(name), "--items")
    return {name: use for name, (use, _) in found.items()}


def _has_no_label(settings: Settings, names: Iterable[str]) -> bool:
    """Whether the options say that data of these columns have no label.

    Raises:
      UserError: they say so of a model that needs one, or speak of it all the same.
    """
    if settings.label != NO_LABEL or NO_LABEL in names:
        return False
    if settings.model != TWO_TOWER:
        raise UserError(
            f"label '{NO_LABEL}' goes with model '{TWO_TOWER}', not {settings.model!r}."
        )
    for option in ("positive", "positive_from"):
        if getattr(settings, option) is not None:
            raise UserError(f"{option} goes with a label, not with label 'none'.")
    return True


def _label(fields: Mapping[str, Any], named: Mapping[str, Use], settings: Settings) -> str | None:
    if _has_no_label(settings, fields):
        return None
    given = [name for name, use in named.items() if use == "label"]
    found = given or [n for n in fields if is_label(n) and n not in named]
    if len(found) != 1:
        why = "no column is named as one" if not found else f"it could be {' or '.join(found)}"
        every = f"; or say --label {NO_LABEL}, if every row is a positive one"
        raise UserError(
            f"Which column is the label? {why.capitalize()}; name it with --label NAME, of "
            f"{listed(fields)}{every if settings.model == TWO_TOWER else ''}."
        )
    return found[0]


def _use(
    name: str, seen: Seen, named: Mapping[str, Use], label: str | None, time: str | None
) -> tuple[Use, str]:
    """What a column is used as, and why."""
    if name == label:
        return "label", "" if named.get(name) else "by its name"
    if name in named:
        return named[name], "" if named[name] in (
            "time",
            "label",
            "weight",
        ) else "as the options say"
    if is_index(name):
        return "ignored", "the index of a data frame, by its name"
    if seen.holds in ("nested", "nothing"):
        return "ignored", seen.why
    is_list = seen.holds == "list"
    if seen.distinct < 2 and seen.present > 1 and not seen.has_gaps and not is_list:
        return "ignored", f"one value in the first {seen.present:,} rows"
    if seen.holds == "time":
        return "ignored", "a time; --time splits by it"
    if seen.holds == "text":
        return "category", seen.why or _alone(name, seen).removeprefix("; ")
    if seen.holds == "boolean":
        return "category", ""
    if seen.holds == "list":
        return "list", ""
    if seen.holds == "number":
        # What a data frame makes of integers beside missing ones.
        of_ids = seen.is_whole and is_id(name)
        how = "with a decimal comma" if seen.has_commas else ""
        return ("category", "whole numbers, by its name") if of_ids else ("number", how)
    return _use_of_integers(name, seen)


def _use_of_integers(name: str, seen: Seen) -> tuple[Use, str]:
    if seen.is_categorical:
        return "category", "categorical by its type"
    if is_time(name) and seen.largest >= _SINCE_1970:
        return "ignored", "a time, by its name; --time splits by it"
    if is_id(name):
        return "category", "by its name" + _alone(name, seen)
    if seen.largest >= _LARGE:
        return "category", "too large for a count" + _alone(name, seen)
    # In a short table a handful of values is a count as likely as not.
    if seen.distinct <= min(_FEW, seen.present // 2):
        return "category", f"{seen.distinct} values in the first rows"
    is_clock = seen.smallest >= _SINCE_2000 and seen.largest < _LARGE
    return "number", f"seconds since 1970? --time {name} splits by them" if is_clock else ""


def _alone(name: str, seen: Seen) -> str:
    """A hint, where there is nothing to learn of a category because no row shares it."""
    is_alone = seen.distinct == seen.present >= _FEW
    return f"; another one in every row: --ignore {name}?" if is_alone else ""


def _check_use(name: str, kind: str, seen: Seen, use: Use, column: pa.ChunkedArray) -> None:
    """Raises a UserError if a column cannot be used so."""
    fitting: dict[str, tuple[str, ...]] = {
        "label": ("integer", "number", "boolean", "text"),
        "number": ("integer", "number", "boolean", "nothing"),
        "category": ("integer", "number", "boolean", "text", "time", "nothing"),
        "time": ("time", "integer"),
        "weight": ("integer", "number", "boolean"),
        "list": ("list", "nothing"),
    }
    if use == "ignored":
        return
    holds = seen.holds
    if _is_text(column.type):  # It may always be taken as it is, and cut if it is none of floats.
        is_written = holds in ("list", "nested")
        if (use == "category" and is_written) or (use == "list" and holds != "nested"):
            return
    is_float = use == "category" and holds == "number" and not _is_text(column.type)
    is_float = is_float and not seen.is_whole
    is_stamp = use == "category" and not _is_text(column.type) and holds == "time"
    if holds in fitting[use] and not is_float and not is_stamp:
        return
    shown = ", ".join(cells.quote(each) for each in cells.some(column))
    wanted = {
        "label": "labels, 0 and 1",
        "number": "numbers",
        "category": "integers or text",
        "list": "lists of integers or text, or text that is cut into them",
        "time": "timestamps, dates, integers, or text such as 2024-01-31 12:00:00",
        "weight": "numbers",
    }
    hint = ""
    if is_float:
        hint = "; write integers with missing cells as nullable ones (Int64 in pandas)"
    if use == "category" and holds == "list":
        hint = f"; name it with --lists {name}"
    raise UserError(
        f"Column {name} has type {kind} and cannot be used as {use}, which takes {wanted[use]}: "
        f"it holds {shown or 'nothing'}{hint}."
    )


def _can_be_category(name: str, seen: Seen, column: pa.ChunkedArray) -> bool:
    try:
        _check_use(name, "", seen, "category", column)
    except UserError:
        return False
    return seen.holds != "nothing"


def _is_text(kind: pa.DataType) -> bool:
    return cells.is_a(kind, "string", "large_string", "string_view", "dictionary")


def listed(names: Iterable[str]) -> str:
    """Names of columns in a sentence, not more than fit in."""
    every = list(names)
    more = f" and {len(every) - _MOST_SHOWN} more" if len(every) > _MOST_SHOWN else ""
    return ", ".join(every[:_MOST_SHOWN]) + more
