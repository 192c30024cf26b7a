"""Columns of lists: their cells, ids and batches, and models that learn from them."""

import json
import re
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from qrhash.ctr.data import cells
from qrhash.ctr.data import lists as lists_of
from qrhash.ctr.data.block import Block, Lists
from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.data.decode import decode
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.inference import as_they_are_here, infer
from qrhash.ctr.data.pipeline import encode
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.data.vocabulary import HashedIds, RawKeys
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from support import ctr_files

UNCHECKED_KEYS = True


def _read(values, **options):
    """The lists of a column, of the rows that are well formed; and {row: reason}."""
    schema = Schema(columns=(Column("x", "", "list", "list", **options),))
    block, reasons = decode(pa.table({"x": values}), schema)
    (lists,) = block.lists
    assert lists.keys.dtype == np.uint64
    assert len(block.labels) == len(lists.lengths) == len(values) - len(reasons)
    return _rows(lists), reasons


def _rows(lists):
    ends = lists.offsets.tolist()
    return [lists.keys[ends[i] : ends[i + 1]].tolist() for i in range(len(ends) - 1)]


def _keys(rows):
    """As cells of a column of categories have them, one by one."""

    def key(value):
        (keys, missing), bad = cells.keys("", pa.array([value]))
        assert not missing[0]
        assert not bad[0]
        return int(keys[0])

    return [[key(value) for value in row or ()] for row in rows]


# --- cells ----------------------------------------------------------------------------------------

INTEGERS = [[1, 2], None, [], [2**62, 1, 1], [-3]]
WORDS = [["a", "b"], None, [], ["7", "späte", "a"], ["true"]]
PAIRS = [[1, 2], None, [3, -3], [4, 5], [6, 2**62]]
KINDS = {
    "integers": (INTEGERS, pa.list_(pa.int64())),
    "large": (INTEGERS, pa.large_list(pa.int64())),
    "small": ([[1], [], [-3]], pa.list_(pa.int8())),
    "unsigned": ([[1], None, [2**63 - 1]], pa.list_(pa.uint64())),
    "pairs": (PAIRS, pa.list_(pa.int64(), 2)),
    "words": (WORDS, pa.list_(pa.string())),
    "large words": (WORDS, pa.large_list(pa.large_string())),
    "views": (WORDS, pa.list_(pa.string_view())),
    "dictionary": (WORDS, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "bytes": ([[b"a", b"7"], None, []], pa.list_(pa.binary())),
    "truth": ([[True, False], None, []], pa.list_(pa.bool_())),
    "fixed bytes": ([[b"ab", b"77"], None], pa.list_(pa.binary(2))),
    "whole decimals": ([[1, 2**63 - 1], None], pa.list_(pa.decimal128(30, 0))),
    "nothing in them": ([[], None, []], pa.list_(pa.null())),
    "nothing": ([None, None], pa.null()),
}


@pytest.mark.parametrize("name", KINDS)
def test_elements_have_the_keys_of_categories(name):
    values, kind = KINDS[name]
    array = pa.array(values, kind)
    assert _read(array) == (_keys(values), {})
    assert _read(array[1:]) == (_keys(values[1:]), {})


def test_a_list_whose_place_is_not_empty_may_be_missing():
    """Arrow leaves behind the elements of what is masked."""
    offsets, elements = pa.array([0, 2, 3, 5], pa.int32()), pa.array([1, 2, 3, 4, 5])
    mask = pa.array([False, True, False])
    array = pa.ListArray.from_arrays(offsets, elements, mask=mask)
    assert _read(array) == ([[1, 2], [], [4, 5]], {})


CUT = {
    "a|b": ["a", "b"],
    " ab | c ": ["ab", "c"],
    "a": ["a"],
    "a|b|": ["a", "b"],
    "a | ": ["a"],
    "|": [],
    "": [],
    "  ": [],
    None: [],
    "7|-3|7": [7, -3, 7],
    "[1]|{2}": ["[1]", "{2}"],
}


@pytest.mark.parametrize("separator", ["|", ", ", ".", "||", "/"])
def test_text_is_cut_at_what_stands_between(separator):
    text = pa.array([cell and cell.replace("|", separator) for cell in CUT])
    wanted = _keys(CUT.values())
    assert _read(text, separator=separator) == (wanted, {})
    assert _read(text.dictionary_encode(), separator=separator) == (wanted, {})
    assert _read(text.cast(pa.large_string())[3:], separator=separator) == (wanted[3:], {})


ELEMENTS = st.lists(st.text(min_size=1) | st.integers(-(2**63), 2**64 - 1) | st.booleans())


def _as_text(rows):
    """Elements as the text they are, that of JSON without halves of characters."""
    return [[str(each) for each in row] for row in rows]


@hypothesis.given(st.lists(ELEMENTS))
def test_text_is_read_as_json_and_python_write_it(rows):
    wanted = _keys(_as_text(rows))
    writers = (repr, json.dumps, lambda row: json.dumps(row, ensure_ascii=False, indent=1))
    for write in writers:
        assert _read(pa.array(map(write, rows), pa.string())) == (wanted, {})


def test_text_is_read_as_numpy_writes_it():
    text = [str(np.array(row)) for row in ([1, 20, -3], ["a", "b c"])]
    assert text == ["[ 1 20 -3]", "['a' 'b c']"]
    assert _read(pa.array(text)) == (_keys([[1, 20, -3], ["a", "b c"]]), {})


def test_characters_in_two_halves_and_escapes_of_either_language():
    """One half alone is no character, and stands for the same as in a text file."""
    text = [r'["\ud83d\ude00", "a\/b"]', r'["x\ud83dy"]', r"""['\U0001f600', "it's \xa0"]"""]
    text = pa.array([*text, r"""["\\/\/\x41"]"""])
    wanted = [["😀", "a/b"], ["x\ufffdy"], ["😀", "it's \xa0"], ["\\//A"]]
    assert _read(text) == (_keys(wanted), {})


def test_spoilt_text_costs_no_more_than_its_length():
    """Hours, where an expression tries all ways to divide the spaces."""
    spaces = " " * 1_000_000
    spoilt = [f"[1{spaces}x", f"[{spaces}x", "[1" + " 1" * 500_000 + "x", "['" + "a" * 1_000_000]
    assert list(_read(pa.array(spoilt))[1]) == [0, 1, 2, 3]
    assert not lists_of.are_of_floats(pa.array(["[" + "1." * 500_000 + "x"]))


NO_LISTS = ["a", "[1", "1]", "[1, 2] x", "[a]", "[1.5]", "[1, [2]]", "[1,,2]", "{}", "['a]", "[01]"]
NO_LISTS += [r"['\d']", "[1e3]", "[1 ... 9]", "[nullx]", "[1] [2]", "['a''b']", "(1, 2)", "[--1]"]


@pytest.mark.filterwarnings("error")
def test_text_that_is_no_list_is_malformed():
    rows, reasons = _read(pa.array(["[1]", *NO_LISTS, " ", "[ ]"]))
    assert rows == [[1], [], []]
    assert list(reasons) == list(range(1, 1 + len(NO_LISTS)))
    assert reasons[1] == "x is not a list as JSON or Python write it: 'a'"


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([[1], [1, None], [None]], {}),
        ([["a"], ["a", None], [""]], {}),
        (["a", "a||b", "a||"], {"separator": "|"}),
        (["a|", "|a", " ||"], {"separator": "|"}),
        (["[1]", "[1, null]", "['', None]"], {}),
    ],
)
def test_a_missing_element_is_a_malformed_row(values, options):
    rows, reasons = _read(pa.array(values), **options)
    assert rows == _keys([["a" if "a" in values[0] else 1]])
    assert list(reasons) == [1, 2]
    assert reasons[1].startswith("x has an element that is missing: ")
    assert repr(str(values[1]))[1:-1] in reasons[1]


def test_a_list_that_is_too_long_is_a_malformed_row_and_never_cut():
    values = [[1, 2], [1, 2, 3], None, [4, 5, 6, 7]]
    rows, reasons = _read(pa.array(values), length=2)
    assert rows == [[1, 2], []]
    assert list(reasons) == [1, 3]
    rule = "x is a list of 3, more than the 2 that --list-length allows: '[1, 2, 3]'"
    assert reasons[1] == rule
    assert _read(pa.array(values), length=4) == (_keys(values), {})


def test_a_row_that_is_malformed_elsewhere_takes_its_list_with_it():
    columns = (Column("y", "", "number", "number"), Column("x", "", "list", "list"))
    table = pa.table({"y": ["1", "two", "3"], "x": [[1], [2, 2], [3, 4]]})
    block, reasons = decode(table, Schema(columns=columns))
    assert list(reasons) == [1]
    assert _rows(block.lists[0]) == [[1], [3, 4]]


def test_what_holds_no_lists_is_said():
    with pytest.raises(UserError, match="Column x has type int64; it must hold lists, or text"):
        _read(pa.array([1, 2]))
    with pytest.raises(UserError, match=r"Column x has type date32.* must hold integers or text"):
        _read(pa.array([[1]], pa.list_(pa.int32())).cast(pa.list_(pa.date32())))


@hypothesis.given(st.lists(st.tuples(st.lists(st.integers(0, 9)), st.booleans())), st.data())
def test_rows_are_taken_by_slices_and_masks(pairs, data):
    values = [row for row, _ in pairs]
    offsets = np.cumsum([0, *map(len, values)])
    keys = np.array([key for row in values for key in row], np.uint64)
    block = Block(*[np.zeros(len(values))] * 4, lists=(Lists(keys, offsets),))
    mask = np.array([wanted for _, wanted in pairs], bool)
    start, stop = (data.draw(st.integers(0, len(values) + 2)) for _ in range(2))
    for taken, wanted in (
        (block.take(mask), [row for row, each in pairs if each]),
        (block.rows(start, stop), values[start:stop]),
        (block.take(mask).rows(1, 3), [row for row, each in pairs if each][1:3]),
    ):
        assert _rows(taken.lists[0]) == wanted
        assert len(taken.labels) == len(wanted)


# --- what a column is used as ---------------------------------------------------------------------

ROWS = 40


def _infer(values, **options):
    fixed = {"click": [i % 2 for i in range(ROWS)], "word": ["a", "b"] * (ROWS // 2)}
    table = pa.table(fixed | values)
    fields = dict(zip(table.column_names, table.schema.types, strict=True))
    return infer(fields, table, Settings(data="events", label="click", **options))


def _column(values, **options):
    return next(each for each in _infer({"x": values}, **options).columns if each.name == "x")


USES = {
    "integers": ([[i, 1] for i in range(ROWS)], "list"),
    "words": ([["a"], None] * 20, "list"),
    "the same one": ([[7]] * ROWS, "list"),
    "a dictionary": (
        pa.array([["a"]] * ROWS, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        "list",
    ),
    "python": ([str([i, "a"]) for i in range(ROWS)], "list"),
    "json": ([json.dumps(["a", str(i)]) for i in range(ROWS - 1)] + [None], "list"),
    "numpy": ([str(np.arange(i % 3)) for i in range(ROWS)], "list"),
    "written but for one": (["[1]"] * (ROWS - 1) + ["1"], "category"),
    "cut": (["a|b", "c"] * 20, "category"),
    "nothing in them": ([[], None] * 20, "there is nothing in it"),
    "large": (pa.array([["a"]] * ROWS, pa.large_list(pa.string_view())), "list"),
    "whole decimals": (pa.array([[1]] * ROWS, pa.list_(pa.decimal128(20, 0))), "list"),
    "decimals": (pa.array([[1]] * ROWS, pa.list_(pa.decimal128(20, 2))), "of lists those .*dec"),
    "floats": ([[0.5, 1.0]] * ROWS, "of lists those of integers or text are read, not double"),
    "floats in text": (["[0.5, 1]", "[1]"] * 20, "of lists those .* not floats"),
    "lists of lists": ([[[1]]] * ROWS, "of lists those .* not list<int64>"),
    "structs": ([[{"a": 1}]] * ROWS, "of lists those .* not struct"),
    "a map": (pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int8())), "this type is not"),
}


@pytest.mark.parametrize("name", USES)
def test_what_a_column_of_lists_is_used_as(name):
    values, wanted = USES[name]
    column = _column(values)
    if wanted in ("list", "category"):
        assert column.use == wanted
    else:
        assert column.use == "ignored"
        assert re.match(wanted, column.reason)
    assert column.separator is None


def test_options_of_lists():
    written, cut = ["[1]"] * ROWS, ["a|b;c"] * ROWS
    assert _column(cut, lists="x").separator == "|"
    assert _column(cut, lists="x", list_separator=";").separator == ";"
    assert _column(cut, columns={"x": {"separator": ";"}}).separator == ";"
    assert _column(cut, columns={"x": {"kind": "list"}}, list_length=3).length == 3
    assert _column(cut, columns={"x": {"length": 4}}, list_length=3).length == 4
    assert _column(written, lists="x").separator is None
    assert _column(written, columns={"x": {"separator": "|"}}).separator == "|"
    assert _column(["7", "8"] * 20, lists="x").use == "list"
    assert _column([None] * ROWS, lists="x").use == "list"
    assert _column([[1]] * ROWS, columns={"x": {"collisions": 3}}).use == "list"
    assert _column([[1]] * ROWS, columns={"x": {"collisions": 3}}, lists="x").use == "list"
    assert _column([[1]] * ROWS, ignore="x").use == "ignored"
    assert _column(written, categories="x").use == "category"
    assert _column(["[0.5]", "[1]"] * 20, categories="x").use == "category"
    assert _column([[1]] * ROWS).type == "list<int64>"
    only = _infer({"x": [[1]] * ROWS}, ignore="word")
    assert (only.categories, only.lists, only.embedded) == ((), ("x",), ("x",))


@pytest.mark.parametrize(
    ("separator", "cells", "section", "wanted"),
    [
        (None, ["a;b", "c|d"], {}, ";"),  # The run had Arrow's or written lists
        (None, ["[1]", "[2"], {}, None),
        (None, [None, " "], {}, ";"),
        ("|", ["a|b", "[1]"], {}, "|"),
        ("|", ["['a', 1]", " [1]"], {}, None),
        ("|", ["[1]", "[2]"], {"separator": "|"}, "|"),
        ("|", [["a"]], {}, "|"),  # Of no use for Arrow's
    ],
)
def test_the_columns_of_a_run_take_lists_as_other_data_write_them(
    separator, cells, section, wanted
):
    column = Column("x", "string", "list", "list", length=2, separator=separator)
    other = Column("y", "string", "text", "category")
    sample = pa.table({"x": cells, "y": ["a"] * len(cells)})
    settings = Settings(data="f", list_separator=";", columns={"x": section})
    found = as_they_are_here(Schema(columns=(column, other)), sample, settings)
    assert found == Schema(columns=(replace(column, separator=wanted), other))


MISTAKES = {
    "integers": (
        {"x": [1, 2] * 20},
        {"lists": "x"},
        "Column x has type int64 and cannot be used as",
    ),
    "floats": (
        {"x": [[0.5]] * ROWS},
        {"lists": "x"},
        "type list<double> .*used as list",
    ),
    "floats in text": ({"x": ["[0.5]"] * ROWS}, {"lists": "x"}, "x .*cannot be used as list"),
    "category": ({"x": [[1]] * ROWS}, {"categories": "x"}, "integers or text: .*--lists x"),
    "twice": ({"x": [[1]] * ROWS}, {"lists": "x", "ignore": "x"}, "'x' is named by --lists alr"),
    "no column": ({}, {"lists": "q"}, "--lists: there is no column 'q', but click, word"),
    "no lists": ({}, {"list_length": 3}, "--list-length goes with columns of lists, and none"),
    "no text": ({"x": [[1]] * ROWS}, {"list_separator": ";"}, "--list-separator cuts .* --lists"),
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
        ({"lists": "C1"}, "lists goes with a table in --data"),
        ({"list_length": 3}, "list_length goes with a table in --data"),
        ({"columns": {"C1": {"combiner": "sum"}}}, "columns.C1: combiner goes with kind 'list'"),
        (
            {"data": "f", "columns": {"a": {"kind": "category", "length": 3}}},
            "columns.a: length goes with kind 'list'",
        ),
        ({"data": "f", "list_length": 0}, "list_length must be at least 1"),
        ({"data": "f", "list_separator": ""}, "list_separator must be what stands between"),
        ({"data": "f", "columns": {"a": {"separator": ""}}}, "separator must be what stands betw"),
        ({"data": "f", "combiner": "median"}, "combiner must be one of mean, sum, sqrtn, max"),
    ],
)
def test_options_that_say_nothing_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(**options)


# --- files ----------------------------------------------------------------------------------------


def _open(data, **options):
    messages = []
    bad_lines = BadLines(100, messages.append)
    source = open_source(Settings(data=str(data), **options), bad_lines)
    return source, messages


def _lists_of(source, start=0, stop=None):
    stop = source.num_lines if stop is None else stop
    return [row for block in source.blocks(start, stop) for row in _rows(block.lists[0])]


def test_the_longest_list_of_all_files_is_the_length(tmp_path):
    files = {"a": [[7]] * 40, "b": [[7]] * 39 + [[1, 2, 3, 4]], "c": [[], None] * 20}
    for name, rows in files.items():
        ctr_files.write_table(
            tmp_path / f"{name}.parquet",
            {"clicked": [0, 1] * 20, "x": rows},
            x={"b": pa.large_list(pa.int32()), "c": pa.list_(pa.null())}.get(name),
        )
    source, messages = _open(tmp_path)
    (column,) = source.schema.of_use("list")
    assert (column.length, messages) == (4, [])
    assert Schema.from_dict(json.loads(json.dumps(source.schema.as_dict()))) == source.schema
    assert _lists_of(source, 77, 83) == [[7]] * 2 + [[1, 2, 3, 4], [], [], []]
    assert _open(tmp_path, columns={"x": {"length": 9}})[0].schema.of_use("list")[0].length == 9


def test_a_very_long_list_is_pointed_out(tmp_path):
    columns = {"clicked": [0, 1] * 20, "x": [[7]] * 39 + [[7] * 1001]}
    told = []
    data = ctr_files.write_table(tmp_path / "e", columns)
    open_source(Settings(data=str(data)), BadLines(0, told.append), told.append)
    (line,) = told
    assert line.startswith("x has a list of 1,001, and every row of a batch as many places")
    data = ctr_files.write_table(tmp_path / "e", columns | {"x": [[7] * 1000] * 40})
    open_source(Settings(data=str(data)), BadLines(0, told.append), told.append)
    assert len(told) == 1


def test_files_whose_lists_are_encoded_in_other_ways(tmp_path):
    kinds = [pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.large_string()]
    for name, kind in zip("abc", kinds, strict=True):
        columns = {"clicked": [0, 1] * 20, "x": [["v", name]] * 40}
        ctr_files.write_table(tmp_path / f"{name}.parquet", columns, x=pa.list_(kind))
    source, messages = _open(tmp_path)
    assert _lists_of(source) == _keys([["v", name] for name in "abc" for _ in range(40)])
    assert not messages
    (tmp_path / "c.parquet").unlink()
    assert _lists_of(_open(tmp_path)[0]) == _keys([["v", name] for name in "ab" for _ in range(40)])


def test_files_whose_lists_are_of_other_types(tmp_path):
    columns = {"clicked": [0, 1] * 20, "word": ["a", "b"] * 20}
    ctr_files.write_table(tmp_path / "a.parquet", columns | {"x": [[1]] * 40})
    ctr_files.write_table(tmp_path / "b.parquet", columns | {"x": [["a"]] * 40})
    with pytest.raises(UserError, match=r"Column x is list.* in .*b.parquet, but list"):
        _open(tmp_path)


def test_lists_are_the_same_whatever_holds_them(tmp_path):
    """Rows out of order by time, and only some of them wanted, too."""
    events = ctr_files.tagged(200)
    events["at"] = [(i * 7) % 200 for i in range(200)]
    texts = ["|".join(map(str, row or ())) for row in events["tags"]]
    written = [row if row is None else str(row) for row in events["tags"]]
    files = {
        "parquet": (ctr_files.write_table(tmp_path / "a", events), {}),
        "cut": (ctr_files.write_csv(tmp_path / "b", events | {"tags": texts}), {"lists": "tags"}),
        "written": (ctr_files.write_csv(tmp_path / "c", events | {"tags": written}), {}),
    }
    wanted = _keys(events["tags"])
    for data, options in files.values():
        source, messages = _open(data, time="at", **options)
        assert source.split_by_time(50) == [150]
        assert source.schema.of_use("list")[0].length == 5
        tested = [row for row, at in zip(wanted, events["at"], strict=True) if at >= 150]
        trained = [row for row, at in zip(wanted, events["at"], strict=True) if at < 150]
        assert _lists_of(source, 0, 150) == trained
        assert _lists_of(source, 160, 190) == tested[10:40]
        assert not messages


def test_malformed_lists_are_counted_by_their_lines(tmp_path):
    tags = ["a|b"] * 40
    tags[3], tags[30] = "a||b", "a|b|c"
    columns = {"clicked": [0, 1] * 20, "tags": tags}
    data = ctr_files.write_csv(tmp_path / "e", columns)
    source, messages = _open(data, lists="tags", list_length=2)
    assert _lists_of(source) == _keys([["a", "b"]] * 38)
    missing, long = messages
    assert missing == f"skipped {data}, line 5: tags has an element that is missing: 'a||b'"
    assert long.startswith(f"skipped {data}, line 32: tags is a list of 3, more than the 2 that ")


# --- ids and batches ------------------------------------------------------------------------------

COLUMNS = (
    Column("c", "", "text", "category"),
    Column("x", "", "list", "list", length=4),
    Column("y", "", "list", "list", length=2),
)


def _block():
    lists = [Lists(np.array([5, 5, 9, 5, 0], np.uint64), np.array([0, 2, 2, 5]))]
    lists += [Lists(np.array([7, 2**63], np.uint64), np.array([0, 1, 2, 2]))]
    column = np.zeros((3, 1), np.uint64)
    return Block(np.ones(3), np.zeros((3, 0)), column, column > 0, lists=tuple(lists))


def test_a_vocabulary_of_elements():
    settings = Settings(data="f", columns={"x": {"min_count": 2}, "y": {"hash_size": 10}})
    ids = build_ids(Counts(settings, ("c",), ("x", "y")), [_block(), _block()])
    assert list(ids) == ["c", "x", "y"]
    none = np.zeros(4, bool)
    assert ids["x"](np.array([5, 0, 9, 8], np.uint64), none).tolist() == [1, 2, 3, 0]
    assert ids["x"].num_embeddings == 4
    assert ids["y"] == HashedIds(10)
    more = build_ids(Counts(Settings(), ("c",), ("x", "y")), [_block()])["y"]
    assert more(np.array([2**63, 7, 5, 0], np.uint64), none).tolist() == [2, 1, 0, 0]
    rare = build_ids(Counts(Settings(min_count=3), ("c",), ("x", "y")), [_block(), _block()])["x"]
    assert rare(np.array([5, 0, 9, 8], np.uint64), none).tolist() == [1, 0, 0, 0]


def test_lists_are_padded_to_their_length():
    ids = {"c": HashedIds(3), "x": HashedIds(100), "y": RawKeys()}
    batch = encode(_block(), Schema(columns=COLUMNS), ids)
    x, y = batch.lists
    assert x.ids.tolist() == [[6, 6, 0, 0], [0] * 4, [10, 6, 1, 0]]
    assert x.mask.tolist() == [[True, True, False, False], [False] * 4, [True] * 3 + [False]]
    assert y.ids.to_numpy().tolist() == [[7, 0], [2**63, 0], [0, 0]]
    assert (x.ids.dtype, batch.ids.shape) == (np.int32, (3, 1))
    only = encode(_block(), Schema(columns=COLUMNS), {"y": RawKeys()})
    assert len(only.lists) == 1
    assert only.lists[0].mask.sum() == 2
