"""What a run leaves behind: JSON lines, the picture of the learning curve, the final table.

`metrics.jsonl` holds one record a line, by "kind": first the settings, then the points of the
learning curve ("progress"), last the "summary". `ids.npz` holds the vocabularies.
"""

import itertools
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from rich.table import Table

from qrhash.ctr.data.vocabulary import Ids, save_ids
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.metrics import CONSTANT, number
from qrhash.ctr.model.ranks import POPULAR
from qrhash.ctr.run.records import Keeper, Summary

METRICS, PICTURE, CHECKPOINTS = "metrics.jsonl", "learning_curve.png", "checkpoints"
BEST, IDS = "best", "ids.npz"
RUNS = Path("runs")


class RunDirectory(Keeper):
    """The directory of one run; made when the first record arrives.

    However the run ends, the records stay and the picture shows the points there are; without
    points there is none.

    Args:
      wanted: a directory without an earlier run; by default a new one, runs/<date-time>.
      resume: whether it is that of an earlier run, which is to go on; by default the last one.
      is_writer: whether this process writes the records: of several, one does.
      begun: called when there is something to keep.

    Attributes:
      path: the directory, once it is made.

    Raises:
      UserError: the directory holds an earlier run; or, to resume, it holds none.
    """

    def __init__(
        self,
        wanted: str | None,
        *,
        resume: bool = False,
        is_writer: bool = True,
        begun: Callable[[], Any] = lambda: None,
    ) -> None:
        self.path: Path | None = None
        self._wanted = None if wanted is None else Path(wanted)
        self._is_writer = is_writer
        self._begun = begun
        self._records: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        if resume:
            self.path = self._wanted or _latest(RUNS)
            self._records = _read(self.path / METRICS)
            begun()
        elif self._wanted is not None and (self._wanted / METRICS).exists():
            raise UserError(
                f"{self._wanted} holds an earlier run; choose another --output-dir, or go on with "
                "it: --resume."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self.path is not None:
            self._file.close()
            if any(record["kind"] == "progress" for record in self._records):
                draw(self._records, self.path / PICTURE)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the run began with."""
        others = ("kind", "source", "schema", "planned")
        return {name: value for name, value in self._records[0].items() if name not in others}

    @property
    def source(self) -> dict[str, int] | None:
        """What was recorded of the data that the run began with."""
        return self._records[0].get("source")

    @property
    def schema(self) -> dict[str, Any] | None:
        """What was recorded of the columns of the data."""
        return self._records[0].get("schema") if self._records else None

    @property
    def planned(self) -> dict[str, Any] | None:
        """What was planned for the columns; None, if the settings say all of it."""
        return self._records[0].get("planned") if self._records else None

    @property
    def best(self) -> Path | None:
        """Where the checkpoint of the best model goes, if one is chosen."""
        return None if self.path is None else self.path / BEST

    @property
    def checkpoints(self) -> Path | None:
        """Where the checkpoints go, once there is a directory."""
        return None if self.path is None else self.path / CHECKPOINTS

    @property
    def note(self) -> str:
        """What there is, and where."""
        if self.path is not None and (self.path / PICTURE).exists():
            return f"{METRICS} and {PICTURE} are in {self.path}"
        return f"{METRICS} is in {self.path}"

    @property
    def going_on(self) -> str:
        """How to go on with a run that was stopped; empty, if no checkpoint is complete."""
        if self.checkpoints is None:
            return ""
        if not any(path.name.isdigit() for path in self.checkpoints.glob("*")):
            return ""
        return f"go on with: qrhash train --resume --output-dir {shlex.quote(str(self.path))}"

    def record(self, record: dict[str, Any]) -> None:
        """Appends a record to the metrics, written out at once."""
        if self.path is None:
            self._create()
        plain = {name: _json_value(value) for name, value in record.items()}
        self._records.append(plain)
        if self._is_writer:
            self._write("a", [plain])

    def keep_ids(self, ids: Mapping[str, Ids]) -> None:
        """Writes the vocabularies beside the metrics, whole or not at all."""
        if self._is_writer and self.path is not None:
            save_ids(self.path / IDS, ids)

    def rewind(self, points: int) -> None:
        """Drops all after so many points of the learning curve, from the file too."""
        # First the settings, and the summary last.
        self._records = kept = self._records[: 1 + points]
        if self._is_writer and self.path is not None:
            part = self.path / f"{METRICS}.part"
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))
            part.replace(self.path / METRICS)
            self._write("a", [])

    def _create(self) -> None:
        path = self._wanted or _unused(RUNS)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.path = path
            if self._is_writer:
                self._write("x", [])
            self._begun()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def _write(self, mode: str, records: Sequence[dict[str, Any]]) -> None:
        assert self.path is not None
        if self._file is None:
            self._file = (self.path / METRICS).open(mode)
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()


def _latest(parent: Path) -> Path:
    """The last run that can be resumed."""
    runs = sorted(
        (path.parent for path in parent.glob(f"*/{CHECKPOINTS}")),
        key=lambda run: (run / CHECKPOINTS).stat().st_mtime,
    )
    if not runs:
        raise UserError(f"There is no run with checkpoints under {parent} to resume.")
    return runs[-1]


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a last line that was cut off is left out."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"There is no run in {path.parent}: it holds no {path.name}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} holds no records of a run: {error}.") from error
    if not records or records[0].get("kind") != "settings":
        raise UserError(f"{path} does not begin with the settings of a run.")
    return records


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draws the learning curve of a run's records, loss and AUC or recall over rows, as a PNG."""
    # Slow to import, and used here only.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    points = [record for record in records if record["kind"] == "progress"]
    summary = next((record for record in records if record["kind"] == "summary"), {})
    rows = [point["rows"] for point in points]
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = _drawn([*points, summary])
    baseline = CONSTANT if "auc" in titles else POPULAR
    named: dict[str, Any] = {}
    for axes, metric in zip(figure.subplots(1, 2), titles, strict=True):
        for part, name, color in (
            ("train", "training rows, before each step", "tab:blue"),
            ("validation", "validation rows", "tab:green"),
            ("test", "test rows", "tab:orange"),
        ):
            # A run that validates has one point of test rows, the last one; of training rows no
            # recall is known.
            values = np.array([point.get(f"{part}_{metric}") for point in points], float)
            if part == "test" or not np.isnan(values).all():
                (named[name],) = axes.plot(rows, values, color=color, marker="o", markersize=3)
        for part, name, color in (
            ("constant", baseline, "gray"),
            ("truth", "ground truth", "black"),
        ):
            if (value := summary.get(f"{part}_{metric}")) is not None:
                named[name] = axes.axhline(value, color=color, linestyle="--", linewidth=1)
        axes.set(xlabel="rows trained on", ylabel=titles[metric])
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named))
    figure.savefig(path, dpi=120)


def final_table(summary: Summary) -> Table:
    """The table a run ends with."""
    table = Table(title=f"{summary.train_rows:,} rows trained on, {summary.test.rows:,} tested on")
    table.add_column("")
    table.add_column("this model", justify="right")
    table.add_column("to compare with")
    for kind in ("rows", "params", "bytes"):
        ours, full = (getattr(summary, f"{of}_{kind}") for of in ("embedding", "full"))
        title = {"rows": "rows of tables", "params": "embedding parameters"}.get(
            kind, "their bytes"
        )
        times = "keys have no full tables"
        if full is not None:
            times = f"{full / max(1, ours):.2f} x fewer than the {full:,} of full tables"
        table.add_row(title, f"{ours:,}", times)
    _add_growth(table, summary)
    table.add_row("dense parameters", f"{summary.dense_params:,}", "")
    if summary.best_rows < summary.train_rows:
        table.add_row("best model, tested here", f"after {summary.best_rows:,} rows", "")
    table.add_row("malformed lines skipped", f"{summary.bad_lines:,}", "")
    speed = f"{summary.rows_per_second:,.0f} rows/s" if summary.rows_per_second else "unknown"
    one_step = "" if summary.rows_per_second else "one step alone, which compiles"
    table.add_row("training speed", speed, one_step)
    table.add_section()
    test = summary.test.named()
    for metric, title in summary.test.titles.items():
        table.add_row(f"test {title}", number(test[metric]), _comparison(summary, metric))
    if "unseen" in test:
        table.add_row("test rows of new items", f"{test['unseen']:.2%}", "misses, all of them")
    return table


def _add_growth(table: Table, summary: Summary) -> None:
    """What became of the keys of tables that grow."""
    growth = summary.growth
    if growth is None:
        return
    totals = growth.totals
    share = totals["in_rows"] / max(1, totals["looked_up"])
    taken = f"of {growth.capacity:,} rows for keys of their own"
    table.add_row("keys with a row", f"{growth.num_keys:,}", taken)
    gone = f"{totals['evicted']:,} evicted, {totals['no_room']:,} refused for want of room"
    table.add_row("keys admitted", f"{totals['admitted']:,}", gone)
    table.add_row("keys met in a row of their own", f"{share:.1%}", "of all that were trained on")
    table.add_row("bytes of the index of keys", f"{summary.index_bytes:,}", "")
    if summary.store is not None:
        moved = f"{summary.store['bytes_moved']:,} bytes moved to and from the store"
        table.add_row("rows found on the device", f"{summary.store['hit_rate']:.1%}", moved)


def _drawn(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The two scores that the picture shows -> what to call them."""
    recalls = [name for record in records for name in record if name.startswith("test_recall_")]
    if not recalls:
        return {"log_loss": "log loss", "auc": "AUC"}
    k = int(recalls[0].rpartition("_")[2])
    return {"log_loss": "in-batch loss", f"recall_{k}": f"recall at {k:,}"}


def _comparison(summary: Summary, metric: str) -> str:
    value = summary.constant.named()[metric]
    if metric == "log_loss" and math.isnan(value):
        return ""  # What recommends the same items to all has no in-batch loss.
    text = f"{number(value)} {summary.constant.baseline}"
    if summary.truth is not None:
        text += f", {number(summary.truth.named()[metric])} ground truth"
    return text


def _json_value(value: Any) -> Any:
    """JSON has no nan: an undefined score is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unused(parent: Path) -> Path:
    """A path named after date and time that does not exist yet."""
    name = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())
