"""The options of the data: where they are, what their columns are, which rows are tested on."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from qrhash.ctr.errors import UserError
from qrhash.ctr.options import PANELS, Option, split_names

# What a table's columns are used as; the Criteo format has its own.
OF_TABLES = (
    *("label", "positive", "positive_from", "numbers", "categories", "lists", "ignore", "time"),
    *("weight", "list_separator", "list_length"),
)

_data = partial(Option, PANELS[0])


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read, and how."""

    data: Annotated[
        str | None,
        _data(
            "A table of events: Parquet or text (comma, tab, semicolon or pipe between cells, "
            "plain or gzip), in a file, a folder, or all that match a pattern such as 'day_*.csv'. "
            "Default: a synthetic click stream whose true click rates are known."
        ),
    ] = None
    preset: Annotated[
        Literal["auto", "criteo", "table"],
        _data(
            "'criteo': a label, 13 integers and 26 categories of hex digits; 'table': the columns "
            "that there are; 'auto': Criteo, if the data look like it."
        ),
    ] = "auto"
    label: Annotated[
        str | None,
        _data(
            "The column of clicks, 0 and 1. Default: the one that is called label, click, ... For "
            "--model two-tower 'none', if there is no such column and every row is a positive one."
        ),
    ] = None
    positive: Annotated[
        str | None,
        _data("Labels are words, and these are clicks, all others none: cart,buy."),
    ] = None
    positive_from: Annotated[
        float | None, _data("Labels are numbers, and clicks from this one on: ratings, say.")
    ] = None
    numbers: Annotated[str | None, _data("Columns that are numbers: a,b.")] = None
    categories: Annotated[str | None, _data("Columns that are categories: c,d.")] = None
    lists: Annotated[
        str | None, _data("Columns that are lists of categories, or text that is cut: g,h.")
    ] = None
    list_separator: Annotated[
        str | None,
        _data(
            "What stands between the elements of a list in text. Default: |, and nothing where "
            "all of it is written as lists are, such as ['a', 'b']."
        ),
    ] = None
    list_length: Annotated[
        int | None,
        _data(
            "How many elements a list may have; a row with a longer one is malformed. Default: as "
            "many as the longest one of each column, which is looked for before training.",
            least=1,
        ),
    ] = None
    ignore: Annotated[str | None, _data("Columns to leave out: e,f.")] = None
    time: Annotated[
        str | None,
        _data(
            "Test on the rows that come last by this column (timestamps, dates, integers, or text "
            "such as 2024-01-31 12:00:00), not on the last lines."
        ),
    ] = None
    weight: Annotated[
        str | None,
        _data("Column of numbers, 0 or more: how much a row counts in the training."),
    ] = None
    delimiter: Annotated[
        Literal["auto", "comma", "tab", "semicolon", "pipe"],
        _data("What stands between the cells of text."),
    ] = "auto"
    header: Annotated[
        Literal["auto", "yes", "no"],
        _data("Whether text begins with a row of names; without, they are column1, column2, ..."),
    ] = "auto"
    synthetic_rows: Annotated[int, _data("Rows of the synthetic stream.", least=2)] = 200_000
    test_fraction: Annotated[float, _data("Last part of the lines, to test on.", least=0)] = 0.2
    test_rows: Annotated[
        int | None,
        _data("Test on exactly this many last lines, instead of a fraction.", least=1),
    ] = None
    max_bad_lines: Annotated[int, _data("Malformed lines to skip before giving up.", least=0)] = 100


def check_data(settings: DataOptions, *, is_criteo: bool) -> None:
    """Raises a UserError if options contradict each other, or the columns of Criteo."""
    for name in OF_TABLES:
        if getattr(settings, name) is not None and is_criteo:
            raise UserError(f"{name} goes with a table in --data, not with the columns of Criteo.")
    if settings.positive is not None and not split_names(settings.positive):
        raise UserError("positive must name a label at least, got none.")
    if settings.positive is not None and settings.positive_from is not None:
        raise UserError("positive and positive_from are two ways: give one of them.")
    if not 0 < settings.test_fraction < 1:
        raise UserError(f"test_fraction must be above 0 and below 1, got {settings.test_fraction}.")
