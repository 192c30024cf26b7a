"""`qrhash predict`: the scores that a trained model gives to new rows.

The rows go through the readers, ids, batches and the compiled function that the training's test
rows went through, so that they get the same logits to the last bit.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from qrhash.ctr.data.block import Block, Source
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import batches
from qrhash.ctr.data.vocabulary import UNSEEN_ID, Ids, Vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.metrics import Scores, click_rates, described, scores
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.trained import kept_of, load_trained, open_others
from qrhash.ctr.tower_settings import TWO_TOWER

SUFFIXES = (".parquet", ".pq", ".csv")
_ROWS = 1 << 16  # rows written at once


class Predicted(NamedTuple):
    """What came of it.

    Attributes:
      rows: how many rows have a score.
      bad_lines: malformed ones that have none.
      unlabelled: rows with a score whose label cannot be read, where there is such a column.
      scores: how good the scores are on the rows that have labels; None without any.
    """

    rows: int
    bad_lines: int
    unlabelled: int
    scores: Scores | None


def predict(
    run: Path,
    data: str,
    output: Path,
    display: Display,
    *,
    overwrite: bool = False,
    max_bad_lines: int | None = None,
) -> Predicted:
    """Writes the score of every row of some data.

    Args:
      run: the directory of a run.
      data: as in `Settings`; needs no label.
      output: a file ending in .parquet or .csv: `row`, the number of the row from 0, `logit`,
        `score`, the probability of a click, and `label`, if there are labels. Of two towers there
        is no probability: `score` is that of the row's query and its item.
      display: is told how far it is.
      overwrite: whether there may be such a file.
      max_bad_lines: malformed lines to skip before giving up; by default as in the run.

    Raises:
      UserError: the run has no checkpoint; the data cannot be used, or have not the columns of the
        run; the output cannot be written, or exists.
    """
    _check_output(output, data, overwrite=overwrite)
    kept = kept_of(run)
    settings = kept.settings
    # Opened first: what is wrong with the data is told before a model is built.
    display.phase("counting the rows", 0)
    most = settings.max_bad_lines if max_bad_lines is None else max_bad_lines
    bad_lines = BadLines(most, display.line)
    source = _Placed(open_others(kept, data, bad_lines, display.line))
    trained = load_trained(kept, display)
    source.ids = trained.ids
    result = _Counts()
    columns = ["row", "score"] if settings.model == TWO_TOWER else ["row", "logit", "score"]
    columns += [] if source.schema.label is None else ["label"]
    with _writer(output, columns) as writer:
        display.phase("scoring", source.num_lines)
        with batches(source, 0, source.num_lines, trained.ids, settings.batch_size) as stream:
            for batch in stream:
                real = batch.weights > 0
                if real.any():
                    logits = np.asarray(trained.learner.logits(batch))[real]
                    places = source.take(len(logits))
                    writer.write(places, logits, batch.labels[real])
                    result.add(logits, batch.labels[real])
                if display.is_due:
                    display.update(result.rows)
        display.done()
        if not result.rows:
            raise UserError(f"{source.name}: none of its {source.num_lines:,} rows can be read.")
    for name in source.strange:
        was = next(column.type for column in source.schema.columns if column.name == name)
        display.line(
            f"Warning: the run has an id for none of the values of {name} in {source.name}: are "
            f"they written as those that it was trained on, of type {was}?"
        )
    unlabelled = result.unlabelled if source.schema.label is not None else 0
    found = result.scores()
    if found is not None and settings.model == TWO_TOWER:
        found = found._replace(log_loss=math.nan)
    return Predicted(result.rows, len(bad_lines), unlabelled, found)


class _Placed:
    """A source that remembers the place of each row that it gave, until it is asked for.

    Attributes:
      ids: of the columns of the model: by them is told what `strange` says.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name, self.schema = source.name, source.schema
        self.num_lines, self.checksum = source.num_lines, source.checksum
        self._places: deque[np.ndarray] = deque()
        self._rest = np.zeros(0, np.int64)
        self.ids: Mapping[str, Ids] = {}
        self._met: dict[str, bool] = {}

    def blocks(self, start: int, stop: int, wanted: np.ndarray | None = None) -> Iterator[Block]:
        """Yields the rows of lines [start, stop); see `Source`."""
        for block in self._source.blocks(start, stop, wanted):
            assert block.places is not None
            self._places.append(block.places)
            self._look(block)
            yield block

    def take(self, rows: int) -> np.ndarray:
        """The places of the next rows."""
        while len(self._rest) < rows:
            self._rest = np.concatenate([self._rest, self._places.popleft()])
        taken, self._rest = self._rest[:rows], self._rest[rows:]
        return taken

    @property
    def strange(self) -> list[str]:
        """The columns that have values, none of which is in the vocabulary."""
        return [name for name, met in self._met.items() if not met]

    def _look(self, block: Block) -> None:
        """Whether the vocabularies have any of the values, of columns of which that is open."""
        for name, ids in self.ids.items():
            if self._met.get(name) or not isinstance(ids, Vocabulary):
                continue
            keys = block.present(name, self.schema)
            if len(keys):
                found = ids(keys, np.zeros(len(keys), np.bool_))
                self._met[name] = bool(np.any(found != UNSEEN_ID))


class _Counts:
    """The labels there are, with the logits given."""

    def __init__(self) -> None:
        self.rows = self.unlabelled = 0
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Takes note of the logits of some rows, and of their labels, nan for none."""
        self.rows += len(logits)
        known = ~np.isnan(labels)
        self.unlabelled += int(np.sum(~known))
        if known.any():
            self._pairs.append((labels[known], logits[known]))

    def scores(self) -> Scores | None:
        """How good the logits are."""
        if not self._pairs:
            return None
        labels, logits = (np.concatenate(column) for column in zip(*self._pairs, strict=True))
        return scores(labels, logits)


# --- the file of scores ---------------------------------------------------------------------------


def _check_output(output: Path, data: str, *, overwrite: bool) -> None:
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output must end in {', '.join(SUFFIXES)}, got {output}.")
    if output.is_dir():
        raise UserError(f"{output} is a directory; name a file in --output.")
    if not output.parent.is_dir():
        raise UserError(f"There is no directory {output.parent} for --output {output.name}.")
    if output.exists() and Path(data).exists() and output.samefile(data):
        raise UserError(f"--output {output} is the data; choose another.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; choose another --output, or --overwrite it.")


class _Writer:
    """Writes rows of scores."""

    _TYPES: ClassVar = {"row": pa.int64(), "label": pa.int8()}

    def __init__(self, path: Path, kind: str, names: Sequence[str]) -> None:
        self._schema = pa.schema([(name, self._TYPES.get(name, pa.float32())) for name in names])
        kinds = {".csv": pyarrow.csv.CSVWriter}
        self._file = kinds.get(kind, pyarrow.parquet.ParquetWriter)(path, self._schema)
        self._columns: list[list[np.ndarray]] = []

    def write(self, places: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> None:
        """Adds rows; labels may be nan."""
        self._columns.append([places, logits, labels])
        if sum(len(column[0]) for column in self._columns) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes out what was added."""
        if not self._columns:
            return
        places, logits, labels = map(np.concatenate, zip(*self._columns, strict=True))
        self._columns = []
        arrays = {"row": places, "logit": logits, "score": logits}
        if "logit" in self._schema.names:
            arrays["score"] = click_rates(logits).astype(np.float32)
        known = ~np.isnan(labels)
        arrays["label"] = pa.array(np.where(known, labels, 0).astype(np.int8), mask=~known)
        written = [arrays[name] for name in self._schema.names]
        self._file.write_table(pa.table(written, schema=self._schema))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
        self._file.close()


@contextmanager
def _writer(output: Path, names: Sequence[str]) -> Iterator[_Writer]:
    """Writes a file that is there when it is whole, and not before."""
    part = output.with_name(f"{output.name}.part")
    try:
        with _Writer(part, output.suffix, names) as writer:
            yield writer
        part.replace(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


def report(result: Predicted, output: Path) -> str:
    """What came of it, in a sentence."""
    text = f"{result.rows:,} rows scored, {result.bad_lines:,} malformed lines skipped: {output}"
    if result.scores is None:
        none = "; none of these rows has a label that can be read" if result.unlabelled else ""
        return text + none
    shown = described(result.scores) or "no score is defined"
    text = f"{text}; {shown} on {result.scores.rows:,} labels"
    if not result.unlabelled:
        return text
    return f"{text}; {result.unlabelled:,} rows have no label that can be read"
