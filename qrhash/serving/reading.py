"""The rows of several requests, read together, and what is wrong with those that cannot be."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from qrhash.ctr.data.decode import decode
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.errors import UserError
from qrhash.serving.bodies import JSON, Rows
from qrhash.serving.limits import Refused
from qrhash.serving.model import Model


def read(
    model: Model, requests: Sequence[Rows]
) -> tuple[Batch | None, list[int], dict[int, Refused]]:
    """The rows of requests whose columns have the same types.

    Args:
      model: what they are read for.
      requests: each with the same schema.

    Returns:
      The rows of the requests that can be read; the numbers of these; and {number: why not} of the
      others: a request is answered as a whole, or not at all.

    Raises:
      Refused: a column has a type that the model cannot read.
    """
    schema = requests[0].schema
    try:
        block, reasons = decode(pa.concat_tables([each.table for each in requests]), schema)
    except UserError as error:
        raise Refused(422, str(error)) from error
    if not reasons:
        return model.encoded(block, schema), list(range(len(requests))), {}
    sizes = [each.table.num_rows for each in requests]
    owner = np.repeat(np.arange(len(requests)), sizes)
    starts = np.cumsum(sizes) - sizes
    found: dict[int, dict[int, str]] = {}
    for row, reason in reasons.items():
        number = int(owner[row])
        found.setdefault(number, {})[int(row - starts[number])] = reason
    refused = {number: _refusal(each) for number, each in found.items()}
    good = [number for number in range(len(requests)) if number not in refused]
    if not good:
        return None, good, refused
    assert block.places is not None
    kept = block.take(np.isin(owner[block.places], good))
    return model.encoded(kept, schema), good, refused


def _refusal(reasons: dict[int, str]) -> Refused:
    first = min(reasons)
    more = f" {len(reasons) - 1:,} more cannot be read." if len(reasons) > 1 else ""
    return Refused(422, f"Row {first}: {reasons[first]}.{more}", reasons)


def warm_up(model: Model) -> None:
    """Does once what a request does, so that the first one finds everything loaded."""
    row = dict.fromkeys(column.name for column in model.columns.schema.used)
    rows = model.columns.rows(json.dumps([row]).encode(), JSON)
    batch, _, _ = read(model, [rows])
    if batch is not None:
        for size in model.sizes:
            model.scored([batch] * size)
