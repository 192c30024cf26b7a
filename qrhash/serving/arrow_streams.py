"""Streams of Arrow from anybody -> tables that take no more memory than they may.

Arrow lets a few bytes stand for many: compressed buffers, dictionaries, views, lists of nothing.
The first are refused before they are read; of the others what they stand for is added up.
"""

import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from flatbuffers.table import Table as FlatTable

from qrhash.ctr.data.cells import is_a, mask
from qrhash.serving.limits import Refused

# Of the flatbuffers of Arrow's format: places of fields, and kinds of messages.
_KIND, _HEADER, _COMPRESSION, _OF_DICTIONARY = 6, 8, 10, 6
_DICTIONARY, _RECORDS = 2, 3

_FLAT = ("integer", "floating", "boolean", "decimal", "date", "timestamp")
_BYTES = ("string", "large_string", "binary", "large_binary")
_PLAIN = (*_BYTES, *_FLAT)
_VIEWS = ("string_view", "binary_view")
_LISTS = ("list", "large_list", "fixed_size_list")
_MOST_ELEMENTS = 1 << 24


def read_stream(body: bytes, names: Sequence[str], *, max_rows: int, max_bytes: int) -> pa.Table:
    """The columns of a stream of record batches.

    Args:
      body: the stream, in Arrow's IPC format.
      names: of the columns to read.
      max_rows: what more rows it may have are not read.
      max_bytes: that cells may take as plain text, and elements that lists may have.

    Returns:
      The table; one more row than `max_rows` or more stands for too many.

    Raises:
      Refused: it is damaged, compressed, or lacks a column; or it stands for more than it may.
    """
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(body) as stream:
            there, wanted = Counter(stream.schema.names), list(names)
            for name in names:
                if not there[name]:
                    listed = ", ".join(there)
                    raise Refused(422, f"The rows have no column {name}; they have {listed}.")
                if there[name] > 1:
                    raise Refused(422, f"The rows have two columns {name}.")
            batches, rows = [], 0
            for batch in stream:
                rows += batch.num_rows
                chosen = batch.select(wanted)
                chosen.validate(full=True)
                batches.append(chosen)
                if rows > max_rows:
                    # Not one more is read: who asks for so many is refused.
                    return pa.table({"": pa.nulls(rows)})
            if not batches:
                return pa.table({"": pa.nulls(0)})
            # Without what else a schema says: rows of equal columns are joined.
            table = pa.Table.from_batches(batches)
            columns = [table[name].combine_chunks() for name in names]
            if table.nbytes + sum(map(_stands_for, names, columns)) > max_bytes:
                raise Refused(413, f"The rows stand for more than the {max_bytes:,} bytes allowed.")
            if not names:
                return table
            return pa.table(columns, names=wanted)
    except (pa.ArrowException, OSError, ValueError, TypeError, struct.error) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(400, f"The body is no stream of Arrow: {first}.") from error


def _stands_for(name: str, column: pa.Array) -> int:
    """About how many bytes more a column takes once it is no longer encoded."""
    kind = column.type
    if is_a(kind, *_PLAIN) or not len(column):
        return 0
    if pa.types.is_dictionary(kind) and is_a(kind.value_type, *_PLAIN):
        if is_a(kind.value_type, *_FLAT):
            return 8 * len(column)
        return _total(pc.binary_length(column.dictionary).take(column.indices))
    if is_a(kind, *_VIEWS):
        # Each is of 16 bytes, of which the first four are its length.
        begin, end = column.offset, column.offset + len(column)
        lengths = np.frombuffer(column.buffers()[1], np.int32)[4 * begin : 4 * end : 4]
        return int(np.sum(lengths, where=mask(column.is_valid()), dtype=np.int64))
    if pa.types.is_null(kind):
        return 8 * len(column)
    if is_a(kind, *_LISTS) and not is_a(kind.value_type, *_LISTS):
        elements = _total(pc.list_value_length(column))
        return elements if elements > _MOST_ELEMENTS else _stands_for(name, column.flatten())
    raise Refused(
        422, f"Column {name} has type {kind}; it must hold numbers, categories or lists of them."
    )


def _total(lengths: pa.Array) -> int:
    return pc.sum(lengths.cast(pa.int64())).as_py() or 0


def _refuse_compressed(body: bytes) -> None:
    """Raises Refused if any buffer of a stream is compressed: none says how large it will be."""
    for message in pa.ipc.MessageReader.open_stream(body):
        metadata = message.metadata.to_pybytes()
        root = FlatTable(metadata, struct.unpack_from("<I", metadata)[0])
        at = root.Offset(_KIND)
        kind = metadata[root.Pos + at] if at else 0
        header = _table_at(root, _HEADER)
        if header is not None and kind == _DICTIONARY:
            header = _table_at(header, _OF_DICTIONARY)
        is_data = kind in (_DICTIONARY, _RECORDS)
        if is_data and header is not None and header.Offset(_COMPRESSION):
            raise Refused(415, "The stream of Arrow is compressed: write it without.")


def _table_at(table: FlatTable, field: int) -> FlatTable | None:
    at = table.Offset(field)
    return FlatTable(table.Bytes, table.Indirect(table.Pos + at)) if at else None
