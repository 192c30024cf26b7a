"""What a server takes at most, and how it says no."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
      max_batch: rows that are scored at once, and the most that a request may have.
      max_delay: seconds that a row waits for others to be scored with.
      max_waiting: rows that may wait; a request that finds more is told to come later.
      max_body: bytes of a body.
      max_held: bytes of bodies that are being read, all together.
      read_seconds: how long a request may take to arrive, and an answer to be taken.
      max_connections: at a time.
    """

    max_batch: int = 512
    max_delay: float = 0.002
    max_waiting: int = 8192
    max_body: int = 8 << 20
    max_held: int = 128 << 20
    read_seconds: float = 10.0
    max_connections: int = 512


class Refused(Exception):  # noqa: N818 -- it is no error of the server
    """A request that is not answered as it was meant.

    Attributes:
      status: of HTTP.
      rows: number of a row in the request -> what is wrong with it.
      headers: of the answer.

    Args:
      status: of HTTP.
      sentence: what is wrong, and what to do.
      rows: see above.
      headers: see above.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        rows: Mapping[int, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.rows, self.headers = status, rows or {}, headers or {}


CLOSE = {"Connection": "close"}
LATER = {"Retry-After": "1"}
