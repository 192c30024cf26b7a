"""What is kept of a run: its records, and what came of it in the end."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qrhash.ctr.data.vocabulary import Ids
from qrhash.ctr.model.metrics import Judged
from qrhash.ctr.run.growth import Growth


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of a run.

    Attributes:
      train_rows: rows trained on, over all epochs.
      best_rows: those of them that the model tested had learnt from: all, unless an earlier model
        was better on validation rows.
      bad_lines: malformed lines skipped.
      embedding_params: parameters of the embeddings: tables and projections.
      embedding_rows: rows of all their tables.
      embedding_bytes: their memory.
      index_bytes: that of the index of keys, of tables that grow.
      growth: what became of their keys; None without such tables.
      store: where rows are in a store, the share found on the device, and bytes; else None.
      full_params: parameters of full tables for all columns; None, if one has no vocabulary.
      full_rows: rows of such tables.
      full_bytes: their memory in float32.
      dense_params: all other parameters.
      rows_per_second: of the steps after the first one, which compiles; evaluations left out.
        0: there was but one.
      test: scores of the model on the test rows.
      constant: those of a baseline that knows no columns: of always saying the training rows' click
        rate, or of always recommending the items that most of them have.
      truth: those of the true click rates; None for real data.
    """

    train_rows: int
    best_rows: int
    bad_lines: int
    embedding_params: int
    embedding_rows: int
    embedding_bytes: int
    index_bytes: int = 0
    growth: Growth | None = None
    store: Mapping[str, Any] | None = None
    full_params: int | None
    full_rows: int | None
    full_bytes: int | None
    dense_params: int
    rows_per_second: float
    test: Judged
    constant: Judged
    truth: Judged | None

    def as_record(self) -> dict[str, Any]:
        """The last record of a run."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        growth = values.pop("growth")
        if growth is not None:
            values |= {f"dynamic_{name}": value for name, value in growth.as_dict().items()}
        store = values.pop("store")
        if store is not None:
            values |= {f"store_{name}": value for name, value in store.items()}
        for name in ("test", "constant", "truth"):
            part = values.pop(name)
            if part is not None:
                values |= {f"{name}_{metric}": score for metric, score in part.named().items()}
        return {"kind": "summary", "test_rows": self.test.rows, **values}


class Keeper:
    """What keeps the records of a run and knows where its checkpoints go: this one, nothing."""

    def record(self, record: dict[str, Any]) -> None:
        """Called with the settings, the points of the learning curve, and the summary."""

    def keep_ids(self, ids: Mapping[str, Ids]) -> None:
        """Called with the ids of every column, after the settings."""

    def rewind(self, points: int) -> None:
        """Drops all after so many points of the learning curve: the run goes on from there."""

    @property
    def source(self) -> Mapping[str, int] | None:
        """What was recorded of the data, if the run is one that is resumed."""
        return None

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """What was recorded of the columns, `Schema.as_dict`, if the run is one that is resumed."""
        return None

    @property
    def planned(self) -> Mapping[str, Mapping[str, Any]] | None:
        """`Settings.columns` as planned, if the run is one that is resumed."""
        return None

    @property
    def best(self) -> Path | None:
        """The directory of the best model's checkpoint, as `checkpoints`."""
        return None

    @property
    def checkpoints(self) -> Path | None:
        """Their directory, once the settings are recorded; None: no checkpoints."""
        return None
