"""Files -> blocks, held against Python's `split` and `int`; and all that can be wrong."""

import gzip

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from qrhash.ctr.data import parquet, text
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.criteo import CATEGORIES, COLUMNS
from qrhash.ctr.data.decode import decode
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from support import ctr_files

FORMATS = {
    "text": ctr_files.write_text,
    "gzip": ctr_files.write_gzip,
    "parquet": ctr_files.write_parquet,
    "parquet_integers": lambda path, rows: ctr_files.write_parquet(
        path, rows, integer_keys=pa.int64()
    ),
}


def _open(path, limit=100):
    messages = []
    bad_lines = BadLines(limit, messages.append)
    settings = Settings(data=str(path), preset="criteo")
    return open_source(settings, bad_lines), bad_lines, messages


def _read(source, start=0, stop=None):
    blocks = list(source.blocks(start, source.num_lines if stop is None else stop))
    return Block(*(np.concatenate([block[i] for block in blocks]) for i in range(4)))


def _oracle(rows):
    labels = [float(row[0]) for row in rows]
    numbers = [[float(cell) if cell else np.nan for cell in row[1:14]] for row in rows]
    keys = [[int(cell or "0", 16) for cell in row[14:]] for row in rows]
    missing = [[not cell for cell in row[14:]] for row in rows]
    return np.array(labels), np.array(numbers), np.array(keys, np.uint64), np.array(missing)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("span", [(0, 100), (0, 1), (30, 80), (99, 100), (37, 74)])
def test_rows_of_any_span_equal_the_oracle(name, span, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(parquet, "_PARQUET_ROWS", 16)
    rows = ctr_files.random_rows(100)
    source, bad_lines, _ = _open(FORMATS[name](tmp_path / "any.name", rows))
    assert source.num_lines == 100
    block = _read(source, *span)
    for got, wanted in zip(block, _oracle(rows[slice(*span)]), strict=False):
        np.testing.assert_array_equal(got, wanted)
    assert (block.keys.dtype, block.missing.dtype) == (np.uint64, np.bool_)
    assert len(bad_lines) == 0


DIGITS = ["0", "f", "F", "00000000", "68fd1e64", "68FD1E64", "f" * 15, "000000000000001", ""]
DIGITS += ["f" * 16, "8000000000000000", "7fffffffffffffff", "0123456789abcdef", "-1", "-7F"]
DIGITS += ["-8000000000000000", "-0"]


def test_keys_of_one_to_sixteen_digits_and_both_cases(tmp_path):
    rows = [ctr_files.make_row(category=cell) for cell in DIGITS]
    block = _read(_open(ctr_files.write_text(tmp_path / "f", rows))[0])
    wanted = np.array([int(cell or "0", 16) % 2**64 for cell in DIGITS], np.uint64)
    np.testing.assert_array_equal(block.keys[:, 7], wanted)
    assert block.missing[:, 7].tolist() == [not cell for cell in DIGITS]


def _categories(column):
    """Keys, None for a missing one, and the rows refused, of a column of categories."""
    rows = len(column)
    columns = dict.fromkeys(COLUMNS, pa.array(np.zeros(rows, np.int64)))
    block, reasons = decode(pa.table(columns | dict.fromkeys(CATEGORIES, column)))
    missing = block.missing[:, 3].tolist()
    keys = [
        None if none else key for key, none in zip(block.keys[:, 3].tolist(), missing, strict=True)
    ]
    return keys, reasons


@hypothesis.given(st.lists(st.none() | st.integers(-(2**63), 2**64 - 1)))
def test_cells_are_keys_one_to_one_whatever_holds_them(cells):
    """An integer, signed or not, and its hex digits are one key; a missing cell is none of all."""
    wanted = [None if cell is None else cell % 2**64 for cell in cells]
    signed = [key if key is None or key < 2**63 else key - 2**64 for key in wanted]
    texts = [None if cell is None else f"{cell:x}" for cell in cells]
    padded = [None if key is None else f"{key:016X}" for key in wanted]
    for column in (
        pa.array(wanted, pa.uint64()),
        pa.array(signed, pa.int64()),
        pa.array(texts, pa.string()),
        pa.array(padded, pa.large_string()).dictionary_encode(),
    ):
        assert _categories(column) == (wanted, {})
    for kind, bits in ((pa.int32(), 31), (pa.int8(), 7)):
        small = [cell for cell in cells if cell is None or -(2**bits) <= cell < 2**bits]
        keys = [None if cell is None else cell % 2**64 for cell in small]
        assert _categories(pa.array(small, kind)) == (keys, {})


@hypothesis.given(st.lists(st.text("0123456789abcdefABCDEF-gx ", max_size=18), min_size=1))
def test_text_is_a_key_or_refused(cells):
    def key(cell):
        try:
            assert set(cell.removeprefix("-")) <= set("0123456789abcdefABCDEF")
            assert len(cell.removeprefix("-")) <= 16
            number = int(cell, 16)
            assert number >= -(2**63)
        except (AssertionError, ValueError):
            return "refused"
        return number % 2**64

    wanted = [None if cell == "" else key(cell) for cell in cells]
    keys, reasons = _categories(pa.array(cells, pa.string()))
    assert keys == [each for each in wanted if each != "refused"]
    assert list(reasons) == [row for row, each in enumerate(wanted) if each == "refused"]
    assert all("C1 is not a category of up to 16 hex digits: " in each for each in reasons.values())


def test_line_ends_and_an_unfinished_last_line(tmp_path):
    rows = ctr_files.random_rows(5)
    path = tmp_path / "dos"
    path.write_bytes(ctr_files.text_of(rows).replace(b"\n", b"\r\n")[:-2])
    source, bad_lines, _ = _open(path)
    assert source.num_lines == 5
    np.testing.assert_array_equal(_read(source).keys, _oracle(rows)[2])
    assert len(bad_lines) == 0


def _spoil(column, cell):
    row = ctr_files.make_row()
    row[COLUMNS.index(column)] = cell
    return "\t".join(row).encode()


MALFORMED = {
    "too few": (b"0\t1\t2", "expected 40 columns, found 3"),
    "empty": (b"", "expected 40 columns, found 1"),
    "too many": (_spoil("C26", "1f\t2"), "expected 40 columns, found 41"),
    "label": (_spoil("label", "2"), "label is not 0 or 1: '2'"),
    "label missing": (_spoil("label", ""), "label is not 0 or 1: ''"),
    "label word": (_spoil("label", "yes"), "label is not 0 or 1: 'yes'"),
    "float": (_spoil("I3", "1.5"), "I3 is not an integer: '1.5'"),
    "0x": (_spoil("I3", "0x1F"), "I3 is not an integer: '0x1F'"),
    "not hex": (
        _spoil("C7", "68fd1g64"),
        "C7 is not a category of up to 16 hex digits: '68fd1g64'",
    ),
    "too long": (
        _spoil("C7", "1" * 17),
        f"C7 is not a category of up to 16 hex digits: '{'1' * 17}'",
    ),
    "quote": (_spoil("C1", '"1f"'), "C1 is not a category of up to 16 hex digits: '\"1f\"'"),
    "return": (_spoil("C1", "1\rf"), "C1 is not a category of up to 16 hex digits: '1 f'"),
    "minus": (_spoil("C1", "-"), "C1 is not a category of up to 16 hex digits: '-'"),
    "0x key": (_spoil("C1", "0x1f"), "C1 is not a category of up to 16 hex digits: '0x1f'"),
    "below": (
        _spoil("C1", "-8000000000000001"),
        "C1 is not a category of up to 16 hex digits: '-8000000000000001'",
    ),
    "bytes": (_spoil("C1", "1f").replace(b"\t1f", b"\t\xff\xfe", 1), "C1 is not a category"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named_and_its_neighbours_are_kept(name, tmp_path):
    line, reason = MALFORMED[name]
    rows = ctr_files.random_rows(6)
    lines = ctr_files.text_of(rows).splitlines()
    path = tmp_path / "f"
    path.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]) + b"\n")
    source, bad_lines, messages = _open(path)
    assert source.num_lines == 7
    np.testing.assert_array_equal(_read(source).keys, _oracle(rows)[2])
    assert len(bad_lines) == 1
    assert f"{path}, line 4: {reason}" in messages[0]


def test_a_line_met_twice_counts_once_and_the_limit_stops(tmp_path):
    rows = ctr_files.random_rows(4) + [["x"]] * 3
    path = ctr_files.write_text(tmp_path / "f", rows)
    source, bad_lines, messages = _open(path, limit=3)
    _read(source)
    _read(source)
    assert len(bad_lines) == len(messages) == 3
    source, _, _ = _open(path, limit=2)
    with pytest.raises(
        UserError, match=r"More than 2 .*line 7: expected 40.*-bad-lines skips more"
    ):
        _read(source)


def test_more_than_half_of_the_lines_may_not_be_malformed(tmp_path):
    path = ctr_files.write_text(tmp_path / "f", ctr_files.random_rows(4) + [["x"]] * 5)
    source, bad_lines, _ = _open(path, limit=100)
    _read(source)
    bad_lines.check(10)
    with pytest.raises(UserError, match=r"5 of 9 lines are malformed, the first .*f, line 5: exp"):
        bad_lines.check(9)


def test_where_no_line_is_well_formed_the_format_is_doubted(tmp_path):
    path = ctr_files.write_text(tmp_path / "f", [["x"]] * 9)
    source, _, _ = _open(path, limit=2)
    with pytest.raises(UserError, match=r"line 3: expected 40 .* do --preset, --delimiter and --h"):
        _read(source)


def test_only_the_first_few_are_shown(tmp_path):
    path = ctr_files.write_text(tmp_path / "f", ctr_files.random_rows(1) + [["x"]] * 20)
    source, bad_lines, messages = _open(path)
    _read(source)
    assert len(bad_lines) == 20
    assert len(messages) == 5
    assert "only counted" in messages[-1]


def test_malformed_parquet_rows(tmp_path):
    path = ctr_files.write_parquet(tmp_path / "f", ctr_files.random_rows(50))
    table = pyarrow.parquet.read_table(path)
    keys = table["C2"].to_pylist()
    keys[40] = "no"
    table = table.set_column(COLUMNS.index("C2"), "C2", pa.array(keys).dictionary_encode())
    pyarrow.parquet.write_table(table, path)
    source, _, messages = _open(path)
    assert len(_read(source, 30, 50).labels) == 19
    assert messages == [
        f"skipped {path}, line 41: C2 is not a category of up to 16 hex digits: 'no'"
    ]


def test_what_is_not_a_data_file_is_said_in_a_sentence(tmp_path):
    def says(path, pattern):
        with pytest.raises(UserError, match=pattern):
            _read(_open(path)[0])

    whole = gzip.compress(ctr_files.text_of(ctr_files.random_rows(200)))
    files = {
        "empty": b"",
        "empty.gz": gzip.compress(b""),
        "truncated.gz": whole[:-100],
        "damaged.gz": whole[:50] + bytes(100) + whole[150:],
        "trailing.gz": whole + b"more",
        "damaged.parquet": b"PAR1 and nothing else",
        "endless": b"x" * (3 << 20),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    says(tmp_path / "absent", "There is no file or folder .*absent")
    (tmp_path / "folder").mkdir()
    says(tmp_path / "folder", "folder holds no file of data")
    says(tmp_path / "empty", "empty is empty")
    says(tmp_path / "empty.gz", "is empty")
    says(tmp_path / "truncated.gz", "truncated gzip file")
    says(tmp_path / "damaged.gz", "damaged gzip file")
    says(tmp_path / "trailing.gz", "damaged gzip file")
    says(tmp_path / "damaged.parquet", "damaged Parquet file")
    says(tmp_path / "endless", "line 1 is longer than")
    pyarrow.parquet.write_table(pa.table({"label": [1], "I1": [1]}), tmp_path / "few.parquet")
    says(tmp_path / "few.parquet", "has no column I2, I3")


def test_parquet_columns_of_a_wrong_type(tmp_path):
    path = ctr_files.write_parquet(tmp_path / "f", ctr_files.random_rows(3))
    table = pyarrow.parquet.read_table(path)
    for name, values in {"C2": [0.5] * 3, "I1": [[1]] * 3}.items():
        changed = table.set_column(COLUMNS.index(name), name, pa.array(values))
        pyarrow.parquet.write_table(changed, path)
        with pytest.raises(UserError, match=f"Column {name} has type") as error:
            _read(_open(path)[0])
        assert (name == "C2") == ("Int64 in pandas" in str(error.value))
