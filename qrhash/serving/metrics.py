"""What a server has done: counted for ever, and over the last seconds.

Latencies are counted in bins that grow by two in a hundred, second by second, so that their
quantiles over a window take no more memory the longer a server runs.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

WINDOW = 10  # seconds
_LEAST, _GROWTH, _BINS = 1e-5, 1.02, 840  # from 10 microseconds to 160 seconds


class Now(NamedTuple):
    """The last seconds.

    Attributes:
      requests: a second.
      rows: scored, a second.
      p50: the median of the seconds that a request took; nan without one.
      p99: what all but one in a hundred took at most.
      fill: rows of a batch, on average; nan without one.
    """

    requests: float
    rows: float
    p50: float
    p99: float
    fill: float


class Metrics:
    """Counts of a server; any thread may tell and ask.

    Args:
      clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._begun = clock()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.events: Counter[tuple[str, str]] = Counter()
        self.rows = self.batches = 0
        self.seconds = 0.0
        # Of each second of the window: latencies by bin; and (requests, rows, batches).
        self._bins = np.zeros((WINDOW, _BINS), np.int32)
        self._sums = np.zeros((WINDOW, 3), np.int64)
        self._second = np.full(WINDOW, -WINDOW, np.int64)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        place = int(math.log(max(seconds, _LEAST) / _LEAST) / math.log(_GROWTH))
        with self._lock:
            now = self._slot()
            self.requests[path, status] += 1
            self.seconds += seconds
            self._sums[now, 0] += 1
            self._bins[now, min(place, _BINS - 1)] += 1

    def batch(self, rows: int) -> None:
        """A batch was scored."""
        with self._lock:
            now = self._slot()
            self.rows += rows
            self.batches += 1
            self._sums[now, 1:] += rows, 1

    def event(self, what: str, outcome: str) -> None:
        """Something was taken over, or was not."""
        with self._lock:
            self.events[what, outcome] += 1

    def now(self) -> Now:
        """What the last seconds were like."""
        with self._lock:
            self._slot()
            second = int(self._clock())
            is_recent = self._second > second - WINDOW
            sums, bins = self._sums[is_recent].sum(0), self._bins[is_recent].sum(0)
        elapsed = max(1.0, min(WINDOW, self._clock() - self._begun))
        requests, rows, batches = map(int, sums)
        total = np.cumsum(bins)

        def quantile(share: float) -> float:
            if not total[-1]:
                return math.nan
            place = int(np.searchsorted(total, share * total[-1]))
            return float(_LEAST * _GROWTH ** (place + 0.5))

        fill = rows / batches if batches else math.nan
        return Now(requests / elapsed, rows / elapsed, quantile(0.5), quantile(0.99), fill)

    def _slot(self) -> int:
        """Where this second is counted."""
        second = int(self._clock())
        place = second % WINDOW
        if self._second[place] != second:
            self._second[place] = second
            self._bins[place] = 0
            self._sums[place] = 0
        return place

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it in the text format of Prometheus.

        Args:
          gauges: name -> what else there is to tell.
        """
        return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        now = self.now()
        with self._lock:
            requests, events = dict(self.requests), dict(self.events)
            counts = {"rows": self.rows, "batches": self.batches}
            seconds = self.seconds
        yield "# TYPE qrhash_requests_total counter"
        for (path, status), count in sorted(requests.items()):
            yield f'qrhash_requests_total{{path="{path}",status="{status}"}} {count}'
        for name, count in counts.items():
            yield f"# TYPE qrhash_{name}_total counter"
            yield f"qrhash_{name}_total {count}"
        yield "# TYPE qrhash_reloads_total counter"
        for (what, outcome), count in sorted(events.items()):
            yield f'qrhash_reloads_total{{what="{what}",outcome="{outcome}"}} {count}'
        yield "# TYPE qrhash_request_seconds summary"
        for share, value in ((0.5, now.p50), (0.99, now.p99)):
            yield f'qrhash_request_seconds{{quantile="{share}"}} {_number(value)}'
        yield f"qrhash_request_seconds_sum {_number(seconds)}"
        yield f"qrhash_request_seconds_count {sum(requests.values())}"
        windowed = {
            "requests_per_second": now.requests,
            "rows_per_second": now.rows,
            "batch_rows": now.fill,
        }
        for name, value in {**windowed, **gauges}.items():
            yield f"# TYPE qrhash_{name} gauge"
            yield f"qrhash_{name} {_number(value)}"


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.6g}" if value % 1 else f"{value:.0f}"
