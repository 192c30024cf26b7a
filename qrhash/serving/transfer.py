"""Bodies as they come in, counted while they do, and answers as JSON or Arrow."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from starlette.requests import Request
from starlette.responses import Response

from qrhash.serving.bodies import ARROW, JSON
from qrhash.serving.limits import CLOSE, LATER, Limits, Refused

_READ_ON = 4  # bodies more are read of one that is too large, so that its client hears of it
_REASONS = 20  # rows that an answer names


class Intake:
    """Reads bodies.

    Args:
      limits: how large they may be, and how slow.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    async def body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
          Refused: it is too large or too slow, or too many others are being read.
          ClientDisconnect: the client has gone.
        """
        limits = self._limits
        declared = request.headers.get("content-length", "0")
        too_large = Refused(
            413,
            f"The body is larger than the {limits.max_body:,} bytes of --max-body-mb: send several "
            "requests.",
            headers=CLOSE,
        )
        if int(declared) > limits.max_body * (1 + _READ_ON):
            raise too_large
        parts: list[bytes] = []
        size = held = 0
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limits.max_body * (1 + _READ_ON):
                        break
                    if size > limits.max_body:
                        parts.clear()
                        continue
                    held += len(part)
                    self._held += len(part)
                    if self._held > limits.max_held:
                        raise Refused(
                            503, "Too many bodies are being read.", headers={**LATER, **CLOSE}
                        )
                    parts.append(part)
        except TimeoutError:
            raise Refused(
                408,
                f"The body did not come within {limits.read_seconds:g} seconds.",
                headers=CLOSE,
            ) from None
        finally:
            self._held -= held
        if size > limits.max_body:
            raise too_large
        return b"".join(parts)


def kind_of(request: Request) -> str:
    """The type of a body, `JSON` or `ARROW`.

    Raises:
      Refused: it is of another, or encoded.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Refused(415, f"The body is encoded as {encoding[:40]}: send it as it is.")
    if found not in (JSON, ARROW):
        raise Refused(415, f"Content-Type must be {JSON} or {ARROW}, got {found[:80]!r}.")
    return found


def wants_arrow(request: Request, kind: str) -> bool:
    """Whether an answer is to be Arrow: as asked for, and otherwise as the body was."""
    accepted = request.headers.get("accept", "*/*").lower()
    if ARROW in accepted:
        return True
    return kind == ARROW and JSON not in accepted


def answer(
    columns: Mapping[str, np.ndarray], said: Mapping[str, Any], *, as_arrow: bool
) -> Response:
    """Arrays [n, ...] as an answer.

    Args:
      columns: name -> array.
      said: what else there is to say, beside them; of Arrow in the metadata of the schema.
      as_arrow: whether it is Arrow, or JSON.
    """
    if not as_arrow:
        lists = {name: _plain(array) for name, array in columns.items()}
        return Response(json.dumps({**said, **lists}), media_type=JSON)
    arrays = {name: _arrow_of(array) for name, array in columns.items()}
    metadata = {name: json.dumps(each) for name, each in said.items()}
    table = pa.table(arrays).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Response(sink.getvalue().to_pybytes(), media_type=ARROW)


def refusal(refused: Refused) -> Response:
    """What a request that is refused is answered."""
    said: dict[str, Any] = {"error": str(refused)}
    if refused.rows:
        said["rows"] = {str(row): refused.rows[row] for row in sorted(refused.rows)[:_REASONS]}
    return Response(
        json.dumps(said),
        status_code=refused.status,
        headers=dict(refused.headers),
        media_type=JSON,
    )


def _plain(array: np.ndarray) -> list[Any]:
    """As JSON has it, which has no infinite numbers, and none that is none."""
    if np.isfinite(array).all():
        return array.tolist()
    return np.where(np.isfinite(array), array, None).tolist()  # type: ignore[call-overload]


def _arrow_of(array: np.ndarray) -> pa.Array:
    """[n] or [n, width, ...] as an array of Arrow, of lists of a fixed size."""
    found = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found
