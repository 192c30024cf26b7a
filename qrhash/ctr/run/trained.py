"""The trained model of a run, and the data it was trained on, or others.

The model is built again from the records of its run, and takes over the best checkpoint, or the
last one. It is on one device, whatever mesh trained it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.ctr.data.block import Source
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.schema import CRITEO, Schema
from qrhash.ctr.data.sources import FileSource, open_source
from qrhash.ctr.data.synthetic import SyntheticSource
from qrhash.ctr.data.vocabulary import Ids, load_ids
from qrhash.ctr.errors import ANEW, UserError
from qrhash.ctr.model.columns import embed_configs
from qrhash.ctr.model.room import ColumnConfig
from qrhash.ctr.options import build
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.goals import Goal, make_goal
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.report import IDS, RunDirectory
from qrhash.ctr.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the records of a run say.

    Attributes:
      run: its directory.
      settings: of the training, as planned, without a mesh.
      schema: the columns of its data.
      source: what was recorded of the data; None, by an earlier version.
      checkpoints: where its best model is, or the last one.
    """

    run: Path
    settings: Settings
    schema: Schema
    source: Mapping[str, int] | None
    checkpoints: Path


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model.

    Attributes:
      learner: the model; it takes no further steps.
      goal: what it is for.
      configs: column name -> its embedding, of the columns of the model.
      ids: of the same columns, in the order of the model.
    """

    learner: Learner
    goal: Goal
    configs: Mapping[str, ColumnConfig]
    ids: Mapping[str, Ids]


def kept_of(run: Path) -> Kept:
    """Reads the records of a run.

    Raises:
      UserError: there are none, or they are of another version.
    """
    directory = RunDirectory(str(run), resume=True)
    recorded = directory.settings
    if not Path(recorded.get("store") or ".").is_dir():
        recorded["store"] = None  # It was trained on another machine: rows are in memory here.
    settings = build(Settings, recorded, f"the run in {run}")
    if directory.planned is not None:
        settings = replace(settings, columns=directory.planned)
    schema = CRITEO if directory.schema is None else Schema.from_dict(directory.schema)
    best, last = directory.best, directory.checkpoints
    assert last is not None
    return Kept(
        run=run,
        settings=replace(settings, mesh=None),
        schema=schema,
        source=directory.source,
        checkpoints=best if best is not None and best.is_dir() else last,
    )


def open_own(kept: Kept, bad_lines: BadLines, notify: Callable[[str], None]) -> Source:
    """The data that a run was trained and tested on.

    Raises:
      UserError: they are gone, or no longer as they were.
    """
    settings = kept.settings
    if settings.data is None:
        return SyntheticSource(settings.synthetic_rows, settings.seed)
    source = open_source(settings, bad_lines, notify, kept.schema)
    now = {"lines": source.num_lines, "checksum": source.checksum}
    if kept.source is not None and kept.source != now:
        raise UserError(f"{source.name} is not as it was when {kept.run} was trained.")
    return source


def open_others(
    kept: Kept, data: str, bad_lines: BadLines, notify: Callable[[str], None]
) -> FileSource:
    """Any data with the columns of a run; they need no label.

    Args:
      kept: of the run.
      data: as in `Settings`.
      bad_lines: is told of malformed rows.
      notify: see `open_source`.

    Raises:
      UserError: they cannot be used, or have not the columns of the run.
    """
    schema = replace(kept.schema.without("time", "weight"), all_positive=False)
    asked = replace(schema, label_required=False)
    return open_source(replace(kept.settings, data=data), bad_lines, notify, asked)


def load_trained(kept: Kept, display: Display, *, is_whole: bool = False) -> Trained:
    """Builds the model of a run, and restores it.

    Args:
      kept: the records of the run.
      display: is told which model it is.
      is_whole: whether rows in a store are all brought into the model, for what takes it as it is:
        it then takes as much memory as one that was trained without a store, and until all are
        there some of them twice.

    Raises:
      UserError: there is no checkpoint that can be read; or the vocabularies cannot.
    """
    run, settings = kept.run, kept.settings
    if is_whole:  # In the end all rows are in memory.
        settings = replace(settings, store=None)
    ids = load_ids(run / IDS, settings, kept.schema.embedded)
    nothing = (
        f"{run} holds no complete checkpoint, and so no trained model: train with "
        "--checkpoint-every other than 0, to the first checkpoint."
    )
    if not kept.checkpoints.is_dir():
        raise UserError(nothing)
    display.phase("building the model", 0)
    sizes = {name: of_keys.num_embeddings for name, of_keys in ids.items()}
    configs = embed_configs(settings, sizes)
    goal = make_goal(settings, kept.schema)
    learner = goal.learner(configs, ids, num_steps=1, to_restore=True)
    with Checkpoints(kept.checkpoints, configs, max_to_keep=None) as checkpoints:
        if not checkpoints.steps:
            raise UserError(nothing)
        try:
            restored = learner.restore(checkpoints)
        except MismatchError as error:
            raise UserError(f"{error} The run is of another version of qrhash.") from error
        except OSError as error:
            raise UserError(f"{error} {ANEW}") from error
    if is_whole and learner.store is not None:
        goal = make_goal(replace(settings, cache_rows=None), kept.schema)
        stored, learner = learner, goal.learner(configs, ids, num_steps=1, to_restore=True)
        learner.take_whole(stored)
    for sentence in restored.damaged:
        display.line(f"Warning: {sentence}")
    display.line(f"{run}: the model after {restored.step:,} steps")
    used = {name: ids[name] for name in configs}
    return Trained(learner=learner, goal=goal, configs=configs, ids=used)
