"""Tables in one file or many -> rows, held against Python's `csv`; and all that can be wrong."""

import csv
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from qrhash.ctr.data import text
from qrhash.ctr.data.files import BadLines, Lines
from qrhash.ctr.data.formats import TextFormat, sniff
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.data.text import TextFile
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from qrhash.strings import hash_strings
from support import ctr_files
from support.training_process import assert_same_curve, numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True


def _open(data, limit=100, **options):
    messages = []
    bad_lines = BadLines(limit, messages.append)
    source = open_source(Settings(data=str(data), **options), bad_lines, messages.append)
    return source, bad_lines, messages


def _read(source, start=0, stop=None):
    stop = source.num_lines if stop is None else stop
    return ctr_files.joined(source.blocks(start, stop))


def _key(value):
    is_integer = isinstance(value, int) or value.isdecimal()
    return int(value) % 2**64 if is_integer else int(hash_strings([value])[0])


def _oracle(events):
    categories = [events["user"], events["ad"]]
    keys = [[0 if v is None else _key(v) for v in row] for row in zip(*categories, strict=True)]
    missing = [[v is None for v in row] for row in zip(*categories, strict=True)]
    prices = [np.nan if price is None else price for price in events["price"]]
    numbers = np.array([prices, events["age"]], np.float64).T.astype(np.float32)
    return np.array(events["clicked"]), numbers, np.array(keys, np.uint64), np.array(missing)


def _assert_rows(block, events):
    for got, wanted in zip(block, _oracle(events), strict=False):
        np.testing.assert_array_equal(got, wanted)
    assert (block.keys.dtype, block.numbers.dtype) == (np.uint64, np.float32)


def _folder(path, events):
    path.mkdir()
    for k, name in enumerate(["a", "b", "c"]):
        part = ctr_files.rows_of(events, 40 * k, 40 * k + (40 if k < 2 else 80))
        ctr_files.write_table(path / f"{name}.parquet", part)
    (path / "_SUCCESS").touch()
    return path


FORMATS = {
    "comma": lambda path, events: ctr_files.write_csv(path / "e.csv", events),
    "tab": lambda path, events: ctr_files.write_csv(path / "e.tsv", events, delimiter="\t"),
    "pipe": lambda path, events: ctr_files.write_csv(path / "e.txt", events, delimiter="|"),
    "semicolon": lambda path, events: ctr_files.write_csv(path / "e", events, delimiter=";"),
    "carriage returns": lambda path, events: ctr_files.write_csv(
        path / "e.csv", {**events, "ad": [ad and ad.strip() for ad in events["ad"]]}, end="\r\n"
    ),
    "gzip": lambda path, events: ctr_files.write_csv(path / "e.csv.gz", events),
    "parquet": lambda path, events: ctr_files.write_table(path / "e.parquet", events),
    "folder": lambda path, events: _folder(path / "e", events),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_CHUNK_BYTES", 400)
    events = ctr_files.events(160)
    source, bad_lines, messages = _open(FORMATS[name](tmp_path, events))
    assert source.num_lines == 160
    assert (source.schema.label, source.schema.time) == ("clicked", None)
    assert source.schema.numbers == ("price", "age")
    assert source.schema.categories == ("user", "ad")
    for start, stop in [(0, 160), (0, 1), (39, 41), (100, 159)]:
        block = _read(source, start, stop)
        _assert_rows(block, ctr_files.rows_of(events, start, stop))
        assert block.places.tolist() == list(range(start, stop))
    assert (len(bad_lines), messages) == (0, [])


def test_without_a_header_columns_are_numbered(tmp_path):
    events = ctr_files.events(120)
    path = ctr_files.write_csv(tmp_path / "e", events, header=False)
    with pytest.raises(UserError, match=r"label\? .*column1, column2, column3, column4, column5"):
        _open(path)
    source, _, _ = _open(path, label="column1")
    assert source.num_lines == 120
    _assert_rows(_read(source), events)


CELL = st.text(st.sampled_from('ab",\n;é 1'), max_size=5)


@hypothesis.given(st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=1, max_size=30))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_text_is_read_as_python_reads_it(tmp_path, rows):
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    path = tmp_path / "rows"
    path.write_text(written.getvalue(), newline="")
    form = TextFormat(",", ("a", "b", "c"), has_header=False, has_quotes=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_CHUNK_BYTES", 64)
        file = TextFile(path, form, compressed=False)
        parts = list(file.parts(Lines(0, file.num_rows), ["c", "a"]))
    assert file.num_rows == len(rows)
    found = [row for part in parts for row in part.table.to_pylist()]
    assert found == [{"c": row[2] or None, "a": row[0] or None} for row in rows]
    lines = [line for part in parts for line in part.lines.tolist()]
    before = [1 + sum(cell.count("\n") for row in rows[:i] for cell in row) for i in range(30)]
    assert lines == [i + before[i] for i in range(len(rows))]


def test_a_malformed_row_is_named_by_its_line(tmp_path):
    """Whatever stands in the rows before it, and in many files by its own."""
    head = "click,user,price\n"
    good = '1,"a\nb",2.5\n0,c,3.25\n' * 30
    (tmp_path / "a.csv").write_text(head + good)
    bad = ["0,x\n", "\n", "1,x,y,z\n", "2,x,1\n", ",x,1\n", "1,x,much\n"]
    (tmp_path / "b.csv").write_text(head + good + "".join(bad) + good)
    source, bad_lines, messages = _open(tmp_path)
    assert source.num_lines == 186
    assert _read(source).places.tolist() == [*range(120), *range(126, 186)]
    assert len(bad_lines) == 6
    assert [message.removeprefix(f"skipped {tmp_path}/b.csv, ") for message in messages] == [
        "line 92: expected 3 columns, found 2",
        "line 93: expected 3 columns, found 1",
        "line 94: expected 3 columns, found 4",
        "line 95: click is not 0 or 1: '2'",
        "line 96: click is not 0 or 1: '' (further ones are only counted)",
    ]


def test_a_quotation_mark_inside_a_cell_is_a_part_of_it(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("click,size,n\n" + '1,5" disk,3\n0,7" disk,4\n1,"a ""b""",5\n' * 20)
    block = _read(_open(path)[0])
    keys = hash_strings(['5" disk', '7" disk', 'a "b"'] * 20)
    np.testing.assert_array_equal(block.keys[:, 0], keys)


def test_a_quotation_mark_that_none_ends(tmp_path, monkeypatch):
    rows = "1,a,3\n0,b,4\n" * 20
    path = tmp_path / "e.csv"
    path.write_text(f'click,word,n\n{rows}1,"c,3\n{rows}')
    with pytest.raises(UserError, match=r"line 42 does not end; a quotation mark begins a cell"):
        _open(path)
    monkeypatch.setattr(text, "_CHUNK_BYTES", 100)
    with pytest.raises(UserError, match=r"line 42 is longer than 100 bytes; a quotation mark"):
        _open(path)


def _sniff(head, delimiter="auto", header="auto", label=None):
    return sniff(head, "path", delimiter=delimiter, header=header, label=label)


HEADS = {
    "names": ("a,b,c\n1,2,3\n", ",", ("a", "b", "c"), True),
    "numbers": ("1,2,x\n", ",", ("column1", "column2", "column3"), False),
    "alike": ("x,y,x\nz,z,v\n", ",", ("column1", "column2", "column3"), False),
    "above numbers": ("word,n,m\nword,1,1.5\nv,2,\n", ",", ("word", "n", "m"), True),
    "one of two": ("w,v\nw,u\n", ",", ("w", "v"), True),
    "words again": ("a,b,c\na,b,f\n", ",", ("column1", "column2", "column3"), False),
    "one again": ("a,b,c,d,e\na,1,2,3,4\n", ",", ("a", "b", "c", "d", "e"), True),
    "twice": ("a,b\n1,2\na,b\n3,4\n", ",", ("a", "b"), True),
    "a date": ("x,2024-01-01\n", ",", ("column1", "column2"), False),
    "an index": (",a,b\n0,1,2\n", ",", ("unnamed1", "a", "b"), True),
    "tabs": ("a, x\tb\n1,1\t2\n1\t2,2\n", "\t", ("a, x", "b"), True),
    "quoted": ('"a;x";"b, y"\n1;2\n3;4\n', ";", ("a;x", "b, y"), True),
    "pipes": ("a|b|c\n1|2|3,4\n", "|", ("a", "b", "c"), True),
    "spaces": ("a , b\n1,2\n", ",", ("a", "b"), True),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_format_of_text_is_told_by_its_beginning(name):
    head, delimiter, names, has_header = HEADS[name]
    form = _sniff(head)
    assert (form.delimiter, form.names, form.has_header) == (delimiter, names, has_header)


def test_options_say_the_format():
    assert _sniff("a,b\n", header="no").names == ("column1", "column2")
    assert _sniff("1,b\n", header="yes").names == ("1", "b")
    assert _sniff("1,b\n", label="1").names == ("1", "b")
    assert _sniff("a,b;c\n", delimiter="semicolon").names == ("a,b", "c")
    with pytest.raises(UserError, match="more than one column x"):
        _sniff("x,x\n", header="yes")


# --- files ----------------------------------------------------------------------------------------


def test_files_of_a_pattern_and_folders_in_order_of_their_names(tmp_path):
    events = ctr_files.events(90)
    (tmp_path / "sub").mkdir()
    for name, start in {"b.csv": 30, "sub/a.csv": 60, "a.csv": 0}.items():
        ctr_files.write_csv(tmp_path / name, ctr_files.rows_of(events, start, start + 30))
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / ".hidden.csv").write_text("no data")
    source, _, messages = _open(tmp_path)
    _assert_rows(_read(source), events)
    assert messages == [f"left out of {tmp_path}, as no data by their names: notes.md"]
    source, _, messages = _open(tmp_path / "*.csv")
    _assert_rows(_read(source), ctr_files.rows_of(events, 0, 60))
    assert messages == []


def test_files_without_a_suffix_are_data_if_there_are_no_others(tmp_path):
    events = ctr_files.events(80)
    for k in range(2):
        path = tmp_path / f"part-0000{k}"
        ctr_files.write_csv(path, ctr_files.rows_of(events, 40 * k, 40 * k + 40), delimiter="\t")
    (tmp_path / "part.crc").touch()
    _assert_rows(_read(_open(tmp_path)[0]), events)
    (tmp_path / "more.csv").write_text("click,word\n" + "1,a\n0,b\n" * 20)
    assert _open(tmp_path)[0].num_lines == 40


def _spoil_columns(events):
    words = [f"w{i}" for i in range(len(events["age"]))]
    return {
        "a type": (
            events | {"age": words},
            "age is string in .*b.parquet, but int64 in .*a.p",
        ),
        "a date": (events | {"user": events["when"]}, "Column user is timestamp.* in .*b.parquet"),
        "one more": (
            events | {"more": words},
            "b.parquet has a column more that .*a.parquet",
        ),
        "one fewer": (
            {name: values for name, values in events.items() if name != "ad"},
            "b.parquet has no column ad; it has clicked, when, user, price, age",
        ),
    }


@pytest.mark.parametrize("name", ["a type", "a date", "one more", "one fewer"])
def test_files_of_different_columns(name, tmp_path):
    events = ctr_files.events(50)
    spoilt, sentence = _spoil_columns(events)[name]
    ctr_files.write_table(tmp_path / "a.parquet", events)
    ctr_files.write_table(tmp_path / "b.parquet", spoilt)
    with pytest.raises(UserError, match=sentence):
        _open(tmp_path)


def test_types_that_are_read_alike_may_differ(tmp_path):
    events = ctr_files.events(80)
    narrow = {"age": pa.float64(), "price": pa.float64(), "ad": pa.large_string()}
    ctr_files.write_table(tmp_path / "a.parquet", ctr_files.rows_of(events, 0, 40), **narrow)
    ctr_files.write_table(tmp_path / "b.parquet", ctr_files.rows_of(events, 40, 80))
    _assert_rows(_read(_open(tmp_path)[0]), events)


def test_a_column_that_is_one_value_in_a_file_may_be_another_in_the_next(tmp_path):
    events = ctr_files.events(80)
    for day in (1, 2):
        part = ctr_files.rows_of(events, 40 * day - 40, 40 * day)
        ctr_files.write_table(tmp_path / f"{day}.parquet", part | {"day": [day] * 40})
    assert "day" in _open(tmp_path)[0].schema.categories


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_in_the_names_of_folders(kind, tmp_path):
    write = ctr_files.write_csv if kind == "csv" else ctr_files.write_table
    events = ctr_files.events(120)
    days = ["2024-01-01", "2024-01-02", "2024-01-03"]
    sites = ["a/b", "5", None]
    written = ["a%2Fb", "5", "__HIVE_DEFAULT_PARTITION__"]
    for k, (day, site) in enumerate(zip(days, written, strict=True)):
        folder = tmp_path / "events" / f"day={day}" / f"site={site}"
        folder.mkdir(parents=True)
        write(folder / f"part.{kind}", ctr_files.rows_of(events, 40 * k, 40 * k + 40))
    source, _, _ = _open(tmp_path / "events", time="day")
    assert source.split_by_time(30) == [80]
    wanted = [None if site is None else _key(site) for site in sites for _ in range(40)]
    place = source.schema.categories.index("site")
    block = _read(source)
    _assert_rows(block._replace(keys=block.keys[:, :2], missing=block.missing[:, :2]), events)
    assert block.missing[:, place].tolist() == [key is None for key in wanted]
    assert block.keys[:, place].tolist() == [key or 0 for key in wanted]
    pattern, _, _ = _open(tmp_path / "events" / "day=*" / "*" / "*")
    assert pattern.schema.categories == source.schema.categories
    assert _open(next(tmp_path.rglob("part.*")))[0].schema.categories == ("user", "ad")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_that_changes_during_the_run(kind, tmp_path):
    write = ctr_files.write_csv if kind == "csv" else ctr_files.write_table
    events = ctr_files.events(60)
    path = write(tmp_path / f"e.{kind}", events)

    def says(pattern):
        with pytest.raises(UserError, match=pattern):
            _read(source)

    source, _, _ = _open(path)
    write(path, ctr_files.events(70))
    says(rf"e.{kind} changed during the run: it had [\d,]+ bytes, and now has [\d,]+; start again")
    path.unlink()
    says(rf"e.{kind} is gone")


def test_what_is_not_a_table_is_said_in_a_sentence(tmp_path):
    def says(name, content, pattern):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=pattern) as error:
            _open(tmp_path / name)
        assert "\n" not in str(error.value)

    says("empty.csv", b"", "empty.csv is empty")
    says("head.csv", b"click,a\n", "head.csv holds no rows")
    says("picture.csv", b"\x89PNG\0\0", "neither text, plain or gzip, nor Parquet")
    says("wide.csv", "click,a\n1,2\n".encode("utf-16"), "is text in UTF-16; write it in UTF-8")
    says("stars.dat", b"1::2::5\n3::4::5\n", "Its cells are divided by '::': write a tab in its")
    says("blanks.dat", b"1 2 5\n3 4 5\n", "are divided by spaces, write tabs in their place")
    says("alike.csv", b"x,y,x\n1,2,3\n", "alike.csv has more than one column x: name each once")
    says("words.csv", b"click\n1\n", "has no columns: none of tab, .*, comma divides .*, 'click',")
    says("said.csv", b"# by me\nclick,a\n1,2\n", "divides its first line, '# by me', and as often")
    says("old.csv", b"click,a\r1,2\r", "ends its lines with carriage returns alone; write line")
    says("lines.csv", b'{"click": 1, "a": 2}\n', "lines.csv is JSON; write it as Parquet or CSV")
    says("list.csv", b'[\n {"click": 1, "a": 2}]\n', "list.csv is JSON; write it as Parquet or CSV")
    with pytest.raises(UserError, match=r"s3://bucket/e\.csv is an address; --data takes files"):
        _open("s3://bucket/e.csv")
    with pytest.raises(UserError, match="--data names no file: it is empty"):
        _open("")
    with pytest.raises(UserError, match=r"No file matches .*x\*.csv"):
        _open(tmp_path / "x*.csv")


def test_categories_of_a_data_frame_are_categories_whatever_they_are_of(tmp_path):
    rows = range(400)
    frame = pd.DataFrame({"click": [i % 2 for i in rows], "word": ["a", "b"] * 200, "x": rows})
    uses = {}
    for name, kind in {"plain": "int64", "marked": "category"}.items():
        path = tmp_path / f"{name}.parquet"
        frame.astype({"x": kind}).to_parquet(path)
        source = _open(path)[0]
        uses[name] = next(each for each in source.schema.columns if each.name == "x")
    assert [each.use for each in uses.values()] == ["number", "category"]
    assert uses["marked"].reason == "categorical by its type"
    assert {each.type for each in uses.values()} == {"int64"}


def test_spaces_behind_every_delimiter_are_no_part_of_a_cell(tmp_path):
    rows = [(i % 2, i % 7, f"w{i % 5}") for i in range(400)]
    tables = {}
    for mark in (",", ", "):
        path = tmp_path / "e.csv"
        lines = [mark.join(map(str, row)) for row in [("click", "id", "word"), *rows]]
        path.write_text("\n".join(lines) + "\n")
        source = _open(path)[0]
        assert source.schema.categories == ("id", "word")
        tables[mark] = pa.concat_tables(source.tables(["click", "id", "word"], 0, 400))
    assert tables[","] == tables[", "]
    path.write_text("click,word\n" + "1, a\n0,b\n" * 40)
    words = pa.concat_tables(_open(path)[0].tables(["word"], 0, 80))["word"]
    assert set(words.to_pylist()) == {" a", "b"}


def test_rows_that_have_not_the_cells_of_the_first_one(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("click,word\n" + "1,a,2\n" * 20)
    with pytest.raises(UserError, match="the 2 cells of the first one, click, word; is that"):
        _open(path)
    path.write_text("click,word\n" + "1,a,2\n" * 20 + "0,b\n1,c\n" * 40)
    assert _open(path)[0].schema.categories == ("word",)


def test_sections_of_columns_that_the_criteo_format_has_none_for(tmp_path):
    path = ctr_files.write_text(tmp_path / "f", ctr_files.random_rows(20))
    with pytest.raises(UserError, match=r"columns.I1: in the Criteo format .*used as number"):
        _open(path, columns={"I1": {"collisions": 2}})
    with pytest.raises(UserError, match=r"columns.x: the data have no such column, but label, I1"):
        _open(path, columns={"x": {"collisions": 2}})


def test_text_in_another_encoding_keeps_its_words_apart(tmp_path):
    """Row by row, so that what is in UTF-8 is what it is."""
    path = tmp_path / "e.csv"
    rows = ["1,Müller", "0,Möller", "1,späte", "0,café"] * 20
    latin = "\n".join(["click,name", *rows]).encode("latin-1")
    path.write_bytes(latin + "\n1,Müller\n".encode())
    block = _read(_open(path)[0])
    names = ["Müller", "Möller", "späte", "café"] * 20 + ["Müller"]
    np.testing.assert_array_equal(block.keys[:, 0], hash_strings(names))


SCRAPS = st.text(st.sampled_from('a1,"\n\r \t'), max_size=100)


@hypothesis.given(SCRAPS, st.integers(1, 4), st.booleans(), st.booleans())
@hypothesis.settings(
    max_examples=300, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_no_text_is_lost_or_too_much(tmp_path, content, columns, has_quotes, has_header):
    """Every row is read or a fault, once, wherever reading begins and ends."""
    path = tmp_path / "scraps"
    path.write_text(content, newline="")
    names = tuple("abcd"[:columns])
    form = TextFormat(",", names, has_header=has_header, has_quotes=has_quotes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_CHUNK_BYTES", 32)
        try:
            file = TextFile(path, form, compressed=False)
        except UserError:  # A row is longer than a chunk, or a quotation mark is not ended.
            hypothesis.reject()
        whole = list(file.parts(Lines(0, file.num_rows), ["a"]))
        ends = [(0, file.num_rows // 2), (file.num_rows // 2, file.num_rows)]
        halves = [part for half in ends for part in file.parts(Lines(*half), ["a"])]
        mask = np.random.default_rng(len(content)).random(file.num_rows) < 0.5
        chosen = list(file.parts(Lines(0, file.num_rows, mask), ["a"]))

    def found(parts):
        cells = [cell for part in parts for cell in part.table["a"].to_pylist()]
        places = [place for part in parts for place in part.places.tolist()]
        lines = [line for part in parts for line in part.lines.tolist()]
        assert len(cells) == len(places) == len(lines)
        return cells, places, lines, {k: v for part in parts for k, v in part.faults.items()}

    assert found(whole) == found(halves)
    cells, places, lines, faults = found(whole)
    rows = [row for row in zip(cells, places, lines, strict=True) if mask[row[1]]]
    assert list(zip(*found(chosen)[:3], strict=True)) == rows
    assert found(chosen)[3] == {place: fault for place, fault in faults.items() if mask[place]}
    assert sorted([*places, *faults]) == list(range(file.num_rows))
    if not has_quotes:
        lines = content.split("\n")
        lines = lines if lines[-1] else lines[:-1]
        assert file.num_rows == max(0, len(lines) - has_header)


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "e.csv"
    path.write_bytes(b"\xef\xbb\xbfclick,word\n" + b"1,a\n0,b\n" * 20)
    assert _open(path)[0].schema.label == "click"


# --- split by time --------------------------------------------------------------------------------


def _shuffled(events):
    order = np.random.default_rng(0).permutation(len(events["age"]))
    return {name: [values[i] for i in order] for name, values in events.items()}, order


@pytest.mark.parametrize("kind", ["csv", "parquet", "integers", "folder"])
def test_the_last_rows_by_time_are_numbered_last(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_CHUNK_BYTES", 500)
    events = ctr_files.events(160)
    if kind == "integers":
        events["when"] = [2**60 + i for i in range(160)]
    mixed, order = _shuffled(events)
    write = FORMATS["folder" if kind == "folder" else "comma" if kind == "csv" else "parquet"]
    source, _, _ = _open(write(tmp_path, mixed), time="when")
    assert source.split_by_time(30) == [130]
    for start, stop in [(0, 130), (130, 160), (20, 77), (130, 140), (129, 130), (150, 160)]:
        part = [i for i in order if (i >= 130) == (start >= 130)]
        first = 130 if start >= 130 else 0
        wanted = [list(order).index(i) for i in part[start - first : stop - first]]
        block = _read(source, start, stop)
        _assert_rows(block, {name: [values[i] for i in wanted] for name, values in mixed.items()})
        assert block.places.tolist() == list(range(start, stop))


def test_rows_of_one_time_stay_together(tmp_path):
    events = ctr_files.events(90)
    events["when"] = [i // 30 for i in range(90)]
    source, _, _ = _open(ctr_files.write_table(tmp_path / "e", events), time="when")
    assert source.split_by_time(7) == [60]
    assert source.split_by_time(31) == [30]
    # The last part takes 30 for 7; the one before it begins at what is left then.
    assert source.split_by_time(5, 7) == [30, 60]
    with pytest.raises(UserError, match="when does not divide the rows: testing on the last 61 of"):
        source.split_by_time(61)


def test_rows_without_a_time_are_malformed(tmp_path):
    events = ctr_files.events(200)
    events["when"][7] = None
    events["when"][93] = "soon"
    path = ctr_files.write_csv(tmp_path / "e.csv", events | {"ad": ["x", "y"] * 100})
    source, bad_lines, messages = _open(path, time="when", label="clicked")
    assert source.split_by_time(10) == [190]
    assert len(_read(source, 0, 190).labels) == 188
    assert len(_read(source, 190, 200).labels) == 10
    assert messages == [
        f"skipped {path}, line 9: when is not a time: ''",
        f"skipped {path}, line 95: when is not a time: 'soon'",
    ]
    assert len(bad_lines) == 2


# --- whole runs -----------------------------------------------------------------------------------

SMALL = ["--features=4", "--bottom-mlp=8", "--top-mlp=8", "--batch-size=32", "--evaluations=2"]
SMALL += ["--dense-lr=0.02", "--table-lr=0.3", "--init-stddev=0.3"]


def _train(*arguments):
    result = train(*arguments, *SMALL)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the same events in two formats, with nothing said but the label."""
    path, events = tmp_path_factory.mktemp("runs"), ctr_files.events(800)
    found = {}
    for name, write in {"csv": FORMATS["comma"], "parquet": FORMATS["parquet"]}.items():
        (path / name).mkdir()
        data = write(path / name, events)
        output = path / name / "run"
        found[name] = (_train("--data", data, "--label=clicked", "--output-dir", output), output)
    return found


def test_a_table_trains_with_nothing_said_but_its_label(runs):
    records = {name: numbers_of(output) for name, (_, output) in runs.items()}
    for one, other in zip(records["csv"][1:], records["parquet"][1:], strict=True):
        assert one == other
    assert records["csv"][-1]["test_log_loss"] < records["csv"][-1]["constant_log_loss"] - 0.1
    assert records["csv"][-1]["bad_lines"] == 0


def test_what_the_columns_are_used_as_is_shown_before_training(runs):
    lines = runs["parquet"][0].stderr.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("columns of ")]
    shown = [" ".join(line.split()) for line in lines[at + 1 : at + 8]]
    assert shown[:4] == [
        "column type used as ids embedding",
        "clicked int64 label",
        "when timestamp[us] ignored (a time; --time splits by it)",
        "user int64 category (by its name) 61 FullTable 61 x 4: 976 bytes",
    ]
    assert shown[5] == "price double number"
    assert all("test log loss" not in line for line in lines[: at + 7])


def test_a_run_split_by_time_goes_on(tmp_path):
    mixed, _ = _shuffled(ctr_files.events(800))
    data = ctr_files.write_csv(tmp_path / "e.csv", mixed)
    options = ["--data", data, "--time=when", "--output-dir", tmp_path / "run"]
    _train(*options, "--checkpoint-every=7", "--keep-checkpoints=9")
    before = numbers_of(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in sorted(checkpoints.iterdir(), key=lambda each: int(each.name))[1:]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    result = train("--resume", "--output-dir", tmp_path / "run")
    assert "resuming after 224 rows, 7 steps" in result.stderr
    assert numbers_of(tmp_path / "run") == before


@pytest.mark.parametrize("model", ["dlrm", "dcn"])
def test_a_table_without_numbers(model, tmp_path):
    events = ctr_files.events(800)
    data = ctr_files.write_table(tmp_path / "e", {k: events[k] for k in ("clicked", "user")})
    _train("--data", data, f"--model={model}", "--output-dir", tmp_path / "run")
    summary = numbers_of(tmp_path / "run")[-1]
    assert summary["test_log_loss"] < summary["constant_log_loss"] - 0.1
    result = train("--data", data, "--partition=drop", "--threshold=0")
    assert "All categories are dropped, and there are no numbers" in result.stderr


def test_sections_of_columns(tmp_path):
    data = ctr_files.write_table(tmp_path / "e", ctr_files.events(200))
    config = tmp_path / "run.toml"
    config.write_text("[columns.age]\ncollisions = 8\n[columns.ad]\nkind = 'ignore'\n")
    _train("--data", data, "--config", config, "--output-dir", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    used = {column["name"]: column["use"] for column in record["schema"]["columns"]}
    assert (used["age"], used["ad"]) == ("category", "ignored")
    config.write_text("[columns.agee]\ncollisions = 8\n")
    result = train("--data", data, "--config", config)
    assert "columns.agee: the data have no such column, but clicked, when" in result.stderr


# --- without a vocabulary -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """Options and directory of a run on keys; `ad` has a vocabulary."""
    path = tmp_path_factory.mktemp("keyed")
    config = path / "run.toml"
    config.write_text("ids = 'keys'\nkey_bits = 16\nlarge_table_rows = 100\n[columns.ad]\n")
    with config.open("a") as file:
        file.write("ids = 'vocabulary'\n")
    data = ctr_files.write_table(path / "e", ctr_files.events(800))
    options = ["--data", data, "--config", config, "--checkpoint-every=9"]
    _train(*options, "--output-dir", path / "run")
    return options, path / "run"


def test_keys_train_as_ids_do(keyed, runs):
    summary, of_ids = numbers_of(keyed[1])[-1], numbers_of(runs["parquet"][1])[-1]
    assert summary["test_log_loss"] == pytest.approx(of_ids["test_log_loss"], abs=0.05)
    assert summary["test_log_loss"] < summary["constant_log_loss"] - 0.1
    assert summary["embedding_rows"] == 2 * 256 + 6
    assert summary["full_rows"] is None


def test_keys_are_the_same_in_text(keyed, tmp_path):
    options, output = keyed
    data = ctr_files.write_csv(tmp_path / "e.csv", ctr_files.events(800))
    _train(*options, "--data", data, "--output-dir", tmp_path / "run")
    assert numbers_of(tmp_path / "run")[1:] == numbers_of(output)[1:]


def test_keys_on_a_mesh_and_a_run_that_goes_on_there(keyed, tmp_path):
    options, output = keyed
    _train(*options, "--mesh=data=2,model=4", "--output-dir", tmp_path / "run")
    assert_same_curve(numbers_of(tmp_path / "run"), numbers_of(output))
    result = train("--resume", "--output-dir", tmp_path / "run")
    assert "resuming after 640 rows" in result.stderr
    assert_same_curve(numbers_of(tmp_path / "run"), numbers_of(output))
