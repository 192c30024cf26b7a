"""What columns are used as, by their types, their values, their names and the options."""

import datetime
import decimal
import json
import re
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from qrhash.ctr.data import cells, inference
from qrhash.ctr.data.decode import decode
from qrhash.ctr.data.inference import infer
from qrhash.ctr.data.schema import CRITEO, Schema
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from qrhash.keys import Keys
from qrhash.strings import hash_strings

ROWS = 400
DAYS = [datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=i) for i in range(ROWS)]


def _infer(table_columns, **options):
    """The schema of columns, beside a label and a category that make it a whole one."""
    table = pa.table(
        {"click": [i % 2 for i in range(ROWS)], "word": ["a", "b"] * 200} | table_columns
    )
    options = {"label": "click"} | options
    fields = dict(zip(table.column_names, table.schema.types, strict=True))
    return infer(fields, table, Settings(data="events", **options))


def _column(values, name="x", **options):
    schema = _infer({name: values}, **options)
    return next(column for column in schema.columns if column.name == name)


INTEGERS = list(range(ROWS))
USES = {
    "floats": ([i / 7 for i in INTEGERS], "number"),
    "decimals": ([decimal.Decimal(i) / 4 for i in INTEGERS], "number"),
    "many integers": (INTEGERS, "number"),
    "few integers": ([i % 100 for i in INTEGERS], "category"),
    "one too many": ([i % 101 for i in INTEGERS], "number"),
    "hashes": ([i * 7**20 % 2**63 - 2**62 for i in INTEGERS], "category"),
    "31 bits": ([2**31 - 1 - i for i in INTEGERS], "number"),
    "32 bits": ([-(2**31) + i for i in INTEGERS], "category"),
    "unsigned": (pa.array([2**64 - 1 - i for i in INTEGERS], pa.uint64()), "category"),
    "words": ([f"w{i}" for i in INTEGERS], "category"),
    "dictionary": (pa.array([f"w{i}" for i in INTEGERS]).dictionary_encode(), "category"),
    "large text": (pa.array([f"w{i}" for i in INTEGERS], pa.large_string()), "category"),
    "whole decimals": (pa.array([i * 7**20 for i in INTEGERS], pa.decimal128(38, 0)), "category"),
    "bytes": ([f"w{i}".encode() for i in INTEGERS], "category"),
    "truth": ([i % 3 == 0 for i in INTEGERS], "category"),
    "truth in text": (["True", "false"] * 200, "category"),
    "integers in text": (list(map(str, INTEGERS)), "number"),
    "hashes in text": ([str(i * 7**20 % 2**64) for i in INTEGERS], "category"),
    "decimals in text": ([f"{i / 7}" for i in INTEGERS], "number"),
    "numbers with gaps": ([None, "", "NA", *map(str, range(ROWS - 3))], "number"),
    "one cell spoilt": (["x", *(f"{i / 7}" for i in range(ROWS - 1))], "number"),
    "many cells spoilt": (["x"] * 9 + [f"{i / 7}" for i in range(ROWS - 9)], "category"),
    "codes with zeros": ([f"{i:05d}" for i in INTEGERS], "category"),
    "hex text": ([f"{i * 7**10 % 2**32:08x}" for i in INTEGERS], "category"),
    "timestamps": (DAYS, "ignored"),
    "dates": ([day.date() for day in DAYS], "ignored"),
    "timestamps in text": (list(map(str, DAYS)), "ignored"),
    "lists": ([[i] for i in INTEGERS], "list"),
    "padded integers": ([f" {i}" for i in INTEGERS], "number"),
    "decimal commas": ([f"{i // 7},{i % 7}5" for i in INTEGERS], "number"),
    "thousands": ([f"{i // 7},{i:03d}" for i in INTEGERS], "category"),
    "codes with commas": ([f"0{i},5" for i in INTEGERS], "category"),
    "codes of many digits": ([f"{i + 10**25}" for i in INTEGERS], "category"),
    "structs": ([{"a": i} for i in INTEGERS], "ignored"),
    "nothing": ([None] * ROWS, "ignored"),
    "empty text": ([""] * ROWS, "ignored"),
    "one value": ([7] * ROWS, "ignored"),
    "one word": (["w"] * ROWS, "ignored"),
}


@pytest.mark.parametrize("name", USES)
def test_what_a_column_is_used_as(name):
    values, use = USES[name]
    column = _column(values)
    assert column.use == use
    assert use != "ignored" or column.reason
    assert use not in ("category", "number") or "not read" not in column.reason


@pytest.mark.parametrize(
    "name",
    [
        *(
            "user_id",
            "id",
            "userId",
            "userid",
            "visitorid",
            "AnimeID",
            "ZIP",
            "item.type",
            "hash_of_it",
            "main category",
        ),
        *("user", "Movie", "item"),
    ],
)
def test_integers_that_are_categories_by_their_names(name):
    assert _column(INTEGERS, name).use == "category"


@pytest.mark.parametrize(
    "name", ["timestamp", "time_stamp", "eventTime", "ts", "created_at", "epoch"]
)
def test_integers_that_are_times_by_their_names_help_only_to_split(name):
    since_1970 = [1_700_000_000 + 60 * i for i in range(ROWS)]
    column = _column(since_1970, name)
    assert (column.use, column.reason) == ("ignored", "a time, by its name; --time splits by it")
    assert _column(since_1970, name, time=name).use == "time"
    assert _column(since_1970, "amount").use == "number"
    assert _column(list(range(ROWS)), name).use == "number"


@pytest.mark.parametrize("name", ["paid", "width", "idle", "user_age", "items", "grid", "price"])
def test_integers_that_are_not(name):
    assert _column(INTEGERS, name).use == "number"


def test_a_category_of_its_own_in_every_row_is_pointed_out():
    assert _column(INTEGERS, "row_id").reason.endswith("another one in every row: --ignore row_id?")
    assert "every row" not in _column([i % 399 for i in INTEGERS], "row_id").reason


@pytest.mark.parametrize(
    ("write", "hint"),
    [
        ("{:,}".format, "numbers? write them as 1234.5"),
        ("${}.50".format, "numbers? write them as 1234.5"),
        ("{}%".format, "numbers? write them as 1234.5"),
        (lambda i: f"{i % 12 + 1}/{i % 28 + 1}/2024", "times? write them as 2024-01-31 12:00"),
        (
            lambda i: f"0{i % 9 + 1}/0{i % 8 + 1}/2024 17:26",
            "times? write them as 2024-01-31 12:00",
        ),
        (lambda i: f"0{i % 9 + 1}.0{i % 8 + 1}.24", "times? write them as 2024-01-31 12:00"),
        (lambda i: f"{i:05}", ""),
        ("10.0.0.{}".format, ""),
        ("{:08d}".format, ""),
    ],
)
def test_text_for_people_is_a_category_that_says_what_it_may_be(write, hint):
    column = _column([write(1000 + i // 2) for i in INTEGERS])
    assert (column.use, column.reason) == ("category", hint)


@pytest.mark.parametrize(
    ("first", "hint"),
    [(960_000_000, "seconds since 1970? --time x splits by them"), (9_000, ""), (-960_000_000, "")],
)
@pytest.mark.parametrize("write", [int, str])
def test_integers_that_may_be_times_are_numbers_that_say_so(first, hint, write):
    column = _column([write(first + 1_000 * i) for i in range(ROWS)])
    assert (column.use, column.reason) == ("number", hint)


def test_numbers_with_a_decimal_comma():
    words = {"x": ["-1,5", "2", None, "3,125"] * 100, "l": ["0,0", "1,0"] * 200}
    schema = _infer(words, label="l", numbers="x")
    assert [each.name for each in schema.columns if each.decimal_comma] == ["x", "l"]
    others = {each.name: ["1"] * ROWS for each in schema.used}
    block, reasons = decode(pa.table(others | words), schema)
    assert not reasons
    assert block.labels[:2].tolist() == [0, 1]
    names = [each.name for each in schema.of_use("number")]
    np.testing.assert_array_equal(
        block.numbers[:4, names.index("x")], np.array([-1.5, 2, np.nan, 3.125], np.float32)
    )
    assert Schema.from_dict(json.loads(json.dumps(schema.as_dict()))) == schema
    as_category = _column(words["x"], categories="x")
    assert (as_category.use, as_category.decimal_comma) == ("category", False)


def test_a_type_is_shown_as_people_call_it():
    words = pa.array([f"w{i}" for i in INTEGERS])
    assert _column(words.dictionary_encode()).type == "string"
    assert _column(pa.nulls(ROWS, pa.string())).type == "string"


@pytest.mark.parametrize("of", [float, lambda i: f"{i}.0"])
def test_ids_that_a_data_frame_made_floats_of_are_categories(of):
    values = [None, *map(of, range(1, ROWS))]
    assert _column(values, "user_id").use == "category"
    assert _column(values, "weight").use == "number"
    assert _column(values, "weight", categories="weight").use == "category"
    spoilt = "3.5" if of(3) == "3.0" else 3.5
    assert _column([*values[:-1], spoilt], "user_id").use == "number"


def test_one_value_and_missing_cells_are_two_things():
    assert _column(["w", None] * 200).use == "category"
    assert _column([True, None] * 200).use == "category"


def test_the_index_of_a_data_frame_is_left_out():
    for name in ("unnamed1", "Unnamed: 0", "Unnamed: 0.1", "__index_level_0__"):
        assert _column(INTEGERS, name).use == "ignored"
    for name in ("unnamed2", "Unnamed: 3"):  # Any other column may lack a name.
        assert _column(INTEGERS, name).use == "number"
    assert _column(INTEGERS, "Unnamed: 0", numbers="Unnamed: 0").use == "number"


def test_options_win():
    columns = {"a": INTEGERS, "b": [i % 3 for i in INTEGERS], "c": DAYS, "d": ["v", "w"] * 200}
    columns |= {"e": [1] * ROWS, "f": INTEGERS}
    sections = {"e": {"kind": "category"}, "f": {"min_count": 2}}
    schema = _infer(
        columns, categories="a", numbers=" b ", time="c", ignore="d,word", columns=sections
    )
    assert schema.label == "click"
    assert (schema.numbers, schema.time) == (("b",), "c")
    assert schema.categories == ("a", "e", "f")
    assert [each.name for each in schema.used] == ["click", "a", "b", "c", "e", "f"]


def test_a_label_is_found_by_its_name_if_there_is_one():
    def label(*names, **options):
        columns = {name: [i % 2 for i in range(ROWS)] for name in names}
        table = pa.table(columns | {"word": ["a", "b"] * 200})
        fields = dict(zip(table.column_names, table.schema.types, strict=True))
        return infer(fields, table, Settings(data="events", **options)).label

    assert label("a", "Clicked") == "Clicked"
    assert label("Click", "label", label="Click") == "Click"
    assert label("click", "label", ignore="label") == "click"
    with pytest.raises(UserError, match=r"No column is named as one; name it with .*a, b, word"):
        label("a", "b")
    with pytest.raises(UserError, match=r"could be click or y; name it with --label NAME"):
        label("click", "y")


def _label_of(values, **options):
    schema = _infer({"l": values}, label="l", **options)
    others = {each.name: ["1"] * ROWS for each in schema.used}
    return decode(pa.table(others | {"l": values}), schema)


@pytest.mark.parametrize(
    "values",
    [
        *([0, 1], [0.0, 1.0], [False, True], ["0", "1"], ["false", "True"], ["0.0", " 1"]),
        *(["no", "Yes"], ["N", "y"], ["f", "t"]),
    ],
)
def test_labels_of_0_and_1_whatever_holds_them(values):
    block, reasons = _label_of(values * 200)
    assert (block.labels.tolist(), reasons) == ([0.0, 1.0] * 200, {})


def test_labels_are_clicks_from_a_number_on():
    block, reasons = _label_of([1, 2, 3.5, 5] * 99 + [None] * 4, positive_from=3.5)
    assert block.labels.tolist() == [0, 0, 1, 1] * 99
    assert set(reasons.values()) == {"l is not a number: ''"}


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        ([" buy", "view", "cart ", "fav"], "buy,cart"),
        (["<=50K", ">50K", "<=50K", "?"], " >50K"),
        (["+", "-", "- ", None], "+"),
        (["Some", "None", "?", ""], "Some"),
        (["3", "3.0", "2", None], "3"),
        ([decimal.Decimal("3.50"), decimal.Decimal("1.00"), decimal.Decimal(2), None], "3.5,1"),
        ([3, 1, 2, None], "1,3"),
        ([3.0, 1.0, 2.0, None], "3, 1"),
        ([True, False, True, None], "True"),
    ],
)
def test_labels_that_are_named_are_clicks(values, positive):
    """All others are none; what is missing is neither."""
    block, reasons = _label_of(values * 10 + values[:3] * 120, positive=positive)
    names = [name.strip() for name in positive.split(",")]
    wanted = [re.sub(r"\.?0+$", "", str(each).strip()) in names for each in values]
    is_missing = values[3] in (None, "")
    assert block.labels.tolist() == wanted[: 4 - is_missing] * 10 + wanted[:3] * 120
    assert set(reasons.values()) == ({"l is not there: ''"} if is_missing else set())


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_named_labels_of_narrow_floats(kind):
    clicks, missing = cells.labels("l", pa.array([0.1, 0.2, None], kind), None, ("0.1",))
    assert (clicks.tolist(), missing.tolist()) == ([1, 0, 0], [False, False, True])


def test_a_label_that_is_named_may_come_late():
    """Of the first rows none need be a click, unless there are no others, or the case is wrong."""
    rows = inference.SAMPLE_ROWS
    table = pa.table({"l": ["view"] * rows, "w": ["a", "b"] * (rows // 2)})
    fields = dict(zip(table.column_names, table.schema.types, strict=True))
    options = {"data": "events", "label": "l"}
    assert infer(fields, table, Settings(positive="buy", **options)).positive == ("buy",)
    with pytest.raises(UserError, match="--positive: none of the first 8,192 labels is 'View'"):
        infer(fields, table, Settings(positive="View", **options))


def test_labels_of_any_text_type():
    table = pa.table({"l": pa.array(["0", "1"] * 200, pa.string_view()), "w": ["a", "b"] * 200})
    fields = dict(zip(table.column_names, table.schema.types, strict=True))
    assert infer(fields, table, Settings(data="events", label="l")).label == "l"


def test_a_few_labels_that_are_neither_are_malformed_rows():
    block, reasons = _label_of([0, 1] * 195 + [7] * 10)
    assert len(block.labels) == 390
    assert set(reasons.values()) == {"l is not 0 or 1: '7'"}


MISTAKES = {
    "ratings": ({"l": [1, 2, 3, 4] * 100}, {"label": "l"}, "label l holds '1', '2'.*--positive-fr"),
    "words": (
        {"l": ["si", "no"] * 200},
        {"label": "l"},
        "The label l holds 'si', 'no': it must .*; --positive WORD,... says which words are cl",
    ),
    "another word": (
        {"l": ["si", "no"] * 200},
        {"label": "l", "positive": "yes,sí"},
        "--positive: none of the first 400 labels is 'yes' or 'sí'; the label l holds 'si', 'no'.",
    ),
    "counts": (
        {"l": [0, 0, 1, 0] * 98 + [2, 2, 3, 9, 1, 0, 0, 0]},
        {"label": "l"},
        "The label l holds '0', '1', '2', .*; --positive-from X makes a click of a label",
    ),
    "no header": ({}, {"label": "column3"}, "no column 'column3', .*; --header no, if the first"),
    "no label": (
        {},
        {"label": "none", "positive": "a", "model": "two-tower", "items": "word"},
        "positive goes with a label, not with label 'none'",
    ),
    "labels with gaps": (
        {"l": ["1", "", "0", None] * 100},
        {"label": "l"},
        "The label l is missing in 200 of the first 400 rows: leave out the rows without one",
    ),
    "floats with gaps": (
        {"l": [1.0, float("nan"), 0.0, None] * 100},
        {"label": "l"},
        "The label l is missing in 200 of the first 400 rows: leave out the rows without one",
    ),
    "no labels": ({"l": [None] * ROWS}, {"label": "l"}, "Column l .*cannot be used as label"),
    "absent": ({}, {"label": "q"}, "--label: there is no column 'q', but click, word"),
    "absent too": ({}, {"ignore": "word,q"}, "--ignore: there is no column 'q', but click, word"),
    "twice": ({"x": INTEGERS}, {"numbers": "x", "ignore": "x"}, "'x' is named by --numbers alre"),
    "as label": ({}, {"numbers": "click"}, "column 'click' is named by --label already"),
    "text": (
        {},
        {"numbers": "word"},
        "word has type string and cannot be used as number.*'a'",
    ),
    "float": ({"x": [0.5, 1] * 200}, {"categories": "x"}, "x has type double .*Int64 in pandas"),
    "list": ({"x": [[1]] * ROWS}, {"categories": "x"}, "Column x .*list.*cannot be used as cat"),
    "stamp": ({"x": DAYS}, {"categories": "x"}, "Column x .*timestamp.*cannot be used as category"),
    "no time": ({}, {"time": "word"}, "word .*cannot be used as time, which takes timestamps"),
    "no category": ({}, {"ignore": "word"}, "No column is a category.*--categories, of word."),
    "none fits": (
        {"x": [[0.5]] * ROWS, "word": [0.5, 1] * 200},
        {},
        "No column is a category, and embeddings are all that this trains: none can be one.",
    ),
    "section": (
        {"x": INTEGERS},
        {"columns": {"x": {"kind": "number"}}, "categories": "x"},
        "columns.x: column 'x' is named by --categories already",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name):
    columns, options, sentence = MISTAKES[name]
    with pytest.raises(UserError, match=sentence) as error:
        _infer(columns, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label": "a"}, "label goes with a table in --data"),
        ({"data": "f", "positive": "a", "positive_from": 2.0}, "are two ways: give one of them"),
        ({"data": "f", "positive": " ,"}, "positive must name a label at least, got none"),
        ({"data": "f", "preset": "criteo", "time": "a"}, "time goes with a table"),
        ({"data": "f", "columns": {"a": {"kind": "number", "collisions": 3}}}, "columns.a: kind"),
        ({"columns": {"C1": {"kind": "ignore"}}}, "columns.C1: kind goes with a table in --data"),
        ({"data": "f", "columns": {"a": {"kind": "text"}}}, "kind must be one of category, number"),
    ],
)
def test_options_that_say_nothing_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(**options)


@pytest.mark.parametrize("items", ["x", "x,l"])
def test_what_an_item_is_told_by_is_a_category(items):
    columns = {"x": INTEGERS, "l": [["a"]] * ROWS, "f": [0.5, 1.5] * 200}
    assert _infer(columns).numbers == ("x", "f")
    schema = _infer(columns, model="two-tower", items=items)
    assert (schema.numbers, schema.categories, schema.lists) == (("f",), ("word", "x"), ("l",))


@pytest.mark.parametrize("missing", ["?", "-", ".", "<NA>"])
def test_what_stands_for_no_number(missing):
    values = [missing if i % 5 == 0 else f"{i}.5" for i in range(ROWS)]
    assert _column(values).use == "number"
    numbers, bad = cells.numbers("x", pa.array(values))
    assert np.isnan(numbers[::5]).all()
    assert not bad.any()


def test_a_schema_comes_back_from_json():
    schema = _infer({"x": INTEGERS, "t": DAYS}, time="t", positive_from=0.5)
    for each in (schema, CRITEO, replace(schema, positive=("a", "b"))):
        assert Schema.from_dict(json.loads(json.dumps(each.as_dict()))) == each


# --- cells ----------------------------------------------------------------------------------------


def _keys(values, kind=None):
    (keys, missing), bad = cells.keys("x", pa.array(values, kind))
    assert not bad.any()
    return [
        None if none else key for key, none in zip(keys.tolist(), missing.tolist(), strict=True)
    ]


@hypothesis.given(st.lists(st.none() | st.integers(-(2**63), 2**64 - 1)))
def test_an_integer_has_one_key_whatever_holds_it(values):
    wanted = [None if value is None else value % 2**64 for value in values]
    texts = [None if value is None else str(value) for value in values]
    assert _keys(texts, pa.string()) == wanted
    assert _keys(texts, pa.large_binary()) == wanted
    assert _keys(values, pa.decimal128(30, 0)) == wanted
    signed = [value for value in values if value is None or value < 2**63]
    assert _keys(signed, pa.int64()) == [None if v is None else v % 2**64 for v in signed]
    unsigned = [value for value in values if value is None or value >= 0]
    assert _keys(unsigned, pa.uint64()) == unsigned
    known = [value for value in values if value is not None]
    assert Keys.of(known).to_numpy().tolist() == [v for v in wanted if v is not None]


@hypothesis.given(st.lists(st.text() | st.from_regex(r"[-+]?0?[0-9]{1,21}(\.0)?", fullmatch=True)))
def test_text_has_the_key_of_the_integer_that_it_is_or_its_hash(values):
    def key(text):
        if text == "":
            return None
        if re.fullmatch(r"(0|-?[1-9][0-9]*)(\.0)?", text, flags=re.ASCII):
            number = int(text.removesuffix(".0"))
            if -(2**63) <= number < 2**64:
                return number % 2**64
        elif text.lower() in ("true", "false"):
            text = text.lower()
        return int(hash_strings([text])[0])

    assert _keys(values, pa.string()) == list(map(key, values))
    assert _keys(pa.array(values, pa.string()).dictionary_encode()) == list(map(key, values))


def test_a_float_has_the_key_of_its_integer():
    values = [0.0, -0.0, 42.0, -7.0, 2.0**52, None, float("nan")]
    wanted = [0, 0, 42, 2**64 - 7, 2**52, None, None]
    assert _keys(values, pa.float64()) == wanted
    assert _keys(["0.0", "42.0", "-7.0", None]) == [0, 42, 2**64 - 7, None]
    _, bad = cells.keys("x", pa.array([0.5, 2.0**60, float("inf"), 1.0]))
    assert bad.tolist() == [True, True, True, False]


def test_truth_has_one_key_whatever_holds_it():
    wanted = _keys(["true", "false", None])
    assert _keys([True, False, None]) == _keys(["True", "FALSE", None]) == wanted
    assert len(set(wanted)) == 3


NUMBERS = {"7": 7, "-0.5": -0.5, "+3": 3, "1e3": 1000, ".5": 0.5, "5.": 5, " 8 ": 8, "007": 7}
NUMBERS |= {"true": 1, "": np.nan, "NaN": np.nan, "NULL": np.nan, r"\N": np.nan, "1e-60": 0}


def test_numbers_of_text():
    values, bad = cells.numbers("x", pa.array([*NUMBERS, None]))
    np.testing.assert_array_equal(values, np.array([*NUMBERS.values(), np.nan], np.float32))
    assert not bad.any()
    _, bad = cells.numbers("x", pa.array(["x", "1,5", "0x1", "inf", "1e60", "--1", "1 2", "٣"]))
    assert bad.all()


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.decimal128(30, 2), pa.string()]
)
def test_numbers_of_every_type(kind):
    column = pa.array([0, 3, None, 12], pa.int64()).cast(kind)
    values, bad = cells.numbers("x", column)
    np.testing.assert_array_equal(values, np.array([0, 3, np.nan, 12], np.float32))
    assert not bad.any()
    assert values.dtype == np.float32


STAMPS = {
    "2024-1-3 9:05": (2024, 1, 3, 9, 5),
    "2024-01-31": (2024, 1, 31),
    "2024/01/31": (2024, 1, 31),
    "2024-01-31 12:30": (2024, 1, 31, 12, 30),
    "2024-01-31T12:30:15": (2024, 1, 31, 12, 30, 15),
    "2024-01-31 12:30:15.25": (2024, 1, 31, 12, 30, 15, 250_000),
    "2024-01-31 12:30:15.123456789": (2024, 1, 31, 12, 30, 15, 123_456),
    "2024-01-31T12:30:15Z": (2024, 1, 31, 12, 30, 15),
    "2024-01-31 12:30:15 UTC": (2024, 1, 31, 12, 30, 15),
    "2024-01-31T12:30:15+02:00": (2024, 1, 31, 10, 30, 15),
    "2024-01-31T12:30:15-0130": (2024, 1, 31, 14, 0, 15),
    "1969-12-31 23:59:59": (1969, 12, 31, 23, 59, 59),
}


@pytest.mark.parametrize("spoilt", [[], ["2024-02-30", "31.12.2024", "soon", "", None]])
def test_times_of_text(spoilt):
    """One cell after the other, where there are days that no month has."""
    zone = datetime.UTC
    since = datetime.datetime(1970, 1, 1, tzinfo=zone)
    moments = [datetime.datetime(*parts, tzinfo=zone) - since for parts in STAMPS.values()]
    wanted = [moment // datetime.timedelta(microseconds=1) for moment in moments]
    times, bad = cells.times("t", pa.array([*STAMPS, *spoilt, "17"], pa.string()))
    assert times[: len(STAMPS)].tolist() == wanted
    assert times[-1] == 17
    assert bad.tolist() == [False] * len(STAMPS) + [True] * len(spoilt) + [False]


def test_times_of_every_type_are_in_order():
    days = [datetime.datetime(2024, 1, day) for day in (1, 2, 3)]
    for kind in (pa.timestamp("s"), pa.timestamp("ns"), pa.date32(), pa.date64()):
        times, bad = cells.times("t", pa.array(days).cast(kind, safe=False))
        assert np.diff(times).tolist() == [86_400 * 10**6] * 2
        assert not bad.any()
    zoned = pa.array(days, pa.timestamp("us", "Europe/Berlin"))
    assert np.diff(cells.times("t", zoned)[0]).tolist() == [86_400 * 10**6] * 2
    assert cells.times("t", pa.array([5, None, -1]))[1].tolist() == [False, True, False]
