"""A connection that waits for nobody for ever.

uvicorn waits as long as a client likes for the head of a request, and for an answer to be taken.
Here either has a time, after which the connection is closed; that of a body is kept in `app`.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Impatient(H11Protocol):
    """HTTP/1.1, by h11, with a limit of time for heads and for answers.

    Attributes:
      seconds: how long either may take.
    """

    seconds = 10.0

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: it is to say what it wants."""
        super().connection_made(transport)
        self._head = self.loop.call_later(self.seconds, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Something has come of a request."""
        if self._is_idle and self._head is None:
            self._head = self.loop.call_later(self.seconds, self.transport.abort)
        super().data_received(data)
        if not self._is_idle and self._head is not None:
            self._head.cancel()
            self._head = None

    def pause_writing(self) -> None:
        """The client takes its answer slowly, or not at all."""
        super().pause_writing()
        if self._answer is None:
            self._answer = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It took some of it."""
        super().resume_writing()
        self._cancel_answer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._cancel_answer()
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def _cancel_answer(self) -> None:
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete
