"""The run from the first line to the last.

One pass counts the lines, one finds the categories of the training lines, one (or `epochs`)
trains, one tests. Rows are taken in the order of the files, and tested on are the last ones, or the
last ones by a column of times: a model of clicks is judged by days it has not seen. Of several
processes each reads its share of the rows (`data/shares`).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from qrhash.arithmetic import ceil_div
from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.ctr.data.block import Source
from qrhash.ctr.data.counts import Counts
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.data.synthetic import SyntheticSource
from qrhash.ctr.errors import ANEW, UserError
from qrhash.ctr.model.columns import FULL_DTYPE, embed_configs, tables_of
from qrhash.ctr.model.metrics import Judged, described, scores
from qrhash.ctr.model.planned import compressed
from qrhash.ctr.model.room import ColumnConfig, dynamic_tables, index_bytes, num_bytes, num_rows
from qrhash.ctr.run.best import Best
from qrhash.ctr.run.devices import make_layout
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.goals import make_goal
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.overview import HEADER, overview
from qrhash.ctr.run.progress import Progress
from qrhash.ctr.run.records import Keeper, Summary
from qrhash.ctr.run.rows import Rows, first_pass, shown, splits
from qrhash.ctr.settings import Settings
from qrhash.ctr.tower_settings import TWO_TOWER


def fit(settings: Settings, display: Display, keeper: Keeper) -> Summary:
    """Trains and tests a model; takes up the last checkpoint if `settings.resume`.

    Args:
      settings: the options.
      display: is told how far the run is.
      keeper: keeps the records.

    Raises:
      UserError: the data or the options cannot be used.
    """
    layout = make_layout(settings)  # a mesh that cannot be is told before the data are read
    display.phase("counting the rows", 0)
    bad_lines = BadLines(settings.max_bad_lines, display.line)
    source = _open(settings, display, keeper, bad_lines)
    if settings.resume:
        _check_source(source, keeper.source)
    train, split = splits(settings, source)
    schema = source.schema
    goal = make_goal(settings, schema)
    source = goal.source(source)
    to_plan = settings.is_planned and not settings.resume
    counts = Counts(settings, schema.categories, schema.lists, with_clicks=to_plan)
    ids, share = first_pass(
        goal, source, counts, train, bad_lines, settings.batch_size, layout, display
    )
    sizes = {name: of_keys.num_embeddings for name, of_keys in ids.items()}
    bad_lines.check(train if share is None else source.num_lines)
    begun_with = settings
    settings = _as_planned(settings, counts, goal.num_rows(train), keeper, display)
    configs = embed_configs(settings, sizes, layout)
    form = ", in the Criteo format" if schema.preset == "criteo" else ""
    display.table(f"columns of {source.name}{form}", HEADER, overview(schema, sizes, configs))
    if goal.note:
        display.line(goal.note)
    tables = tables_of(configs)
    embedding_params = sum(config.num_params for config in tables)
    used = {name: ids[name] for name in configs}
    data = Rows(source, train, split, used, settings.batch_size, goal, share)
    display.phase("building the model", train)
    num_steps = settings.epochs * ceil_div(goal.num_rows(train), settings.batch_size)
    learner = goal.learner(configs, ids, num_steps=num_steps, layout=layout)

    if not settings.resume:
        of_data = {"lines": source.num_lines, "checksum": source.checksum}
        columns = {"source": of_data, "schema": schema.as_dict()}
        planned = {} if settings is begun_with else {"planned": settings.columns}
        keeper.record({"kind": "settings", **begun_with.as_dict(), **columns, **planned})
    keeper.keep_ids(ids)
    best = Best(keeper.best if train < split else None, configs, settings.patience)
    with closing(best):
        with _checkpoints(settings, configs, keeper) as checkpoints:
            progress = _train(settings, data, learner, display, keeper, checkpoints, best)
            rows_per_second = progress.rows_per_second
        _warn_of_labels(settings, progress, display)
        learner.count_keys()
        if not best.restore(learner):
            display.line("Warning: the best model's checkpoint is gone; the last one is tested")
    test, constant = _test(data, learner, progress.click_rate, display)
    progress.point(test)
    summary = Summary(
        train_rows=progress.rows,
        best_rows=best.rows or progress.rows,
        bad_lines=len(bad_lines),
        **_full(sizes, settings.features),
        embedding_params=embedding_params,
        embedding_rows=sum(map(num_rows, tables)),
        embedding_bytes=sum(map(num_bytes, tables)),
        index_bytes=sum(map(index_bytes, dynamic_tables(configs))),
        growth=learner.growth if learner.growth.capacity else None,
        store=learner.store,
        dense_params=learner.num_params - embedding_params,
        rows_per_second=rows_per_second,
        test=test,
        constant=constant,
        truth=_truth(source, split) if settings.data is None and goal.has_truth else None,
    )
    keeper.record(summary.as_record())
    return summary


def _as_planned(
    settings: Settings, counts: Counts, num_rows: int, keeper: Keeper, display: Display
) -> Settings:
    """The settings with what is planned for each column, or was when the run began."""
    if settings.resume and keeper.planned is not None:
        return replace(settings, columns=keeper.planned)
    if settings.resume or not settings.is_planned:
        return settings
    plan, sections = compressed(settings, counts, num_rows)
    if plan is not None:
        display.line(f"planned to lose {plan.loss:.2%} of what full tables would know")
    return replace(settings, columns=sections)


def _full(sizes: Mapping[str, int | None], features: int) -> dict[str, int | None]:
    """What full tables would take; None where a column has keys, and no number of ids."""
    known = [size for size in sizes.values() if size is not None]
    rows = sum(known) if len(known) == len(sizes) else None
    params = None if rows is None else rows * features
    num_bytes = None if params is None else params * FULL_DTYPE.itemsize
    return {"full_rows": rows, "full_params": params, "full_bytes": num_bytes}


def _open(settings: Settings, display: Display, keeper: Keeper, bad_lines: BadLines) -> Source:
    if settings.data is None:
        return SyntheticSource(settings.synthetic_rows, settings.seed)
    schema = None if keeper.schema is None else Schema.from_dict(keeper.schema)
    return open_source(settings, bad_lines, display.line, schema)


def _check_source(source: Source, begun: Mapping[str, int] | None) -> None:
    """Raises UserError unless these are the data that a run began with."""
    if begun is None:  # It began with an earlier version
        return
    rule = "A run is resumed with the data that it began with"
    if begun["lines"] != source.num_lines:
        raise UserError(
            f"{rule}: they had {begun['lines']:,} lines, {source.name} has {source.num_lines:,}."
        )
    if begun["checksum"] != source.checksum:
        raise UserError(
            f"{rule}: {source.name} has as many lines, {source.num_lines:,}, but its contents are "
            "others."
        )


def _checkpoints(
    settings: Settings, configs: Mapping[str, ColumnConfig], keeper: Keeper
) -> AbstractContextManager[Checkpoints | None]:
    directory = keeper.checkpoints
    if directory is None or (settings.checkpoint_every == 0 and not settings.resume):
        return nullcontext()
    return Checkpoints(directory, configs, max_to_keep=settings.keep_checkpoints)


def _train(
    settings: Settings,
    data: Rows,
    learner: Learner,
    display: Display,
    keeper: Keeper,
    checkpoints: Checkpoints | None,
    best: Best,
) -> Progress:
    """Trains; adds a point to the learning curve now and then, but not the last one."""
    with data.sample(settings.eval_rows) as stream:
        sample = list(stream)
    goal = data.goal
    if data.is_validated and not sample:
        raise UserError(f"{data.source.name}: none of the lines to validate on {goal.wanted}.")
    total = goal.num_rows(data.train) * settings.epochs
    points = [total * k // settings.evaluations for k in range(1, settings.evaluations)]
    progress = Progress(keeper.record, settings.batch_size, goal.running)
    first_epoch, position = 0, None
    if settings.resume and checkpoints is not None:
        first_epoch, position = _resume(learner, checkpoints, progress, best, display)
        keeper.rewind(progress.points)
        points = [point for point in points if point > progress.rows]
    display.phase("training", total)
    display.update(progress.rows, "compiling the step")

    def point() -> None:
        with progress.pause(learner.params):
            found = goal.scores(learner, sample)
            part = "validation" if data.is_validated else "test"
            progress.point(found, part)
            display.line(f"after {progress.rows:,} rows: {part} {described(found)}")
            if data.is_validated:
                best.update(found, learner, progress.rows)

    for epoch in range(first_epoch, settings.epochs):
        if best.is_over:
            break
        with data.training() as stream:
            if position is not None:
                stream.set_state(position)
                position = None
            where = _Position(epoch, stream)
            stops = _stops(settings, points, progress.rows, learner.steps)
            for batch in learner.ahead(stream, stops):
                display.check()
                progress.add(batch, learner.step(batch))
                if display.is_due:
                    notes = (progress.note(), learner.note)
                    display.update(progress.rows, "  ".join(filter(None, notes)))
                is_point = bool(points) and progress.rows >= points[0]
                if is_point:
                    points = [point for point in points if point > progress.rows]
                    point()
                if best.is_over:
                    display.line(f"no better since {best.rows:,} rows: the training ends here")
                    break
                if _is_due(settings.checkpoint_every, learner.steps, is_point):
                    _save(learner, checkpoints, where, progress, best)
            is_last = epoch == settings.epochs - 1 or best.is_over
            if is_last and settings.checkpoint_every != 0 and progress.rows:
                _save(learner, checkpoints, where, progress, best)
    jax.block_until_ready(learner.params)  # the clock stops when the work has
    if not best.is_over:
        display.done()
    if not progress.rows:
        raise UserError(
            f"{data.source.name}: none of the {data.train} training lines {goal.wanted}."
        )
    if data.is_validated and best.seen != progress.rows:
        point()
    return progress


class _Position(NamedTuple):
    """Where in the data a run stands."""

    epoch: int
    stream: Any


def _stops(
    settings: Settings, points: Sequence[int], rows: int, steps: int
) -> Callable[[Batch], bool]:
    """Whether the training stands still after a batch, of batches that come in their order."""

    def is_stop(batch: Batch) -> bool:
        nonlocal rows, steps
        before, rows, steps = rows, rows + int(batch.weights.sum()), steps + 1
        is_point = any(before < point <= rows for point in points)
        return is_point or _is_due(settings.checkpoint_every, steps, is_point)

    return is_stop


def _is_due(every: int | None, step: int, is_point: bool) -> bool:
    """Whether a checkpoint is to be saved after a step; by default at the points of the curve."""
    if every is None:
        return is_point
    return every > 0 and step % every == 0


def _save(
    learner: Learner,
    checkpoints: Checkpoints | None,
    where: _Position,
    progress: Progress,
    best: Best,
) -> None:
    if checkpoints is None:
        return
    position = {"epoch": where.epoch, "position": where.stream.get_state()}
    learner.count_keys()
    state = {
        "progress": progress.as_dict(),
        "best": best.as_dict(),
        "growth": learner.growth.as_dict(),
    }
    with progress.pause(learner.params):
        learner.save(checkpoints, position | state)


def _resume(
    learner: Learner,
    checkpoints: Checkpoints,
    progress: Progress,
    best: Best,
    display: Display,
) -> tuple[int, Any]:
    """Takes up the last checkpoint that can be read; returns the epoch and the position in it."""
    if not checkpoints.steps:
        display.line(f"{checkpoints.directory} holds no complete checkpoint: starting anew")
        best.forget_after(0)
        return 0, None
    try:
        with warnings.catch_warnings(record=True) as lost:
            warnings.simplefilter("always", UserWarning)
            restored = learner.restore(checkpoints)
    except MismatchError as error:
        raise UserError(
            f"{error} A run is resumed with the data that it began with, and with this version of "
            "qrhash: has one of them changed?"
        ) from error
    except OSError as error:
        raise UserError(f"{error} {ANEW}") from error
    for sentence in (*restored.damaged, *(each.message for each in lost)):
        display.line(f"Warning: {sentence}")
    if "batches" not in restored.extra["position"]:
        raise UserError(
            f"{checkpoints.directory} is of an earlier version of qrhash, which told the place in "
            "the data otherwise: go on with that version, or start anew."
        )
    progress.take_over(restored.extra["progress"])
    if "best" in restored.extra:  # An earlier version knew none.
        best.take_over(restored.extra["best"], restored.step)
    if "growth" in restored.extra:
        learner.growth.take_over(restored.extra["growth"])
    display.line(f"resuming after {progress.rows:,} rows, {restored.step:,} steps")
    return restored.extra["epoch"], restored.extra["position"]


def _warn_of_labels(settings: Settings, progress: Progress, display: Display) -> None:
    """Tells of labels that are all alike; two towers learn from clicks alone."""
    if settings.model != TWO_TOWER and progress.click_rate in (0, 1):
        alike = f"the labels of all training rows are {progress.click_rate:.0f}"
        display.line(f"Warning: {alike}: there is nothing to learn from them")


def _test(
    data: Rows, learner: Learner, click_rate: float, display: Display
) -> tuple[Judged, Judged]:
    """Scores on all test rows, of the model and of the baseline."""
    lines = data.source.num_lines - data.split
    with data.test() as stream:
        through = shown(stream, display, "testing", lines)
        test, baseline = data.goal.tested(learner, through, click_rate)
    if not test.rows:
        raise UserError(f"{data.source.name}: none of the last {lines} lines {data.goal.wanted}.")
    return test, baseline


def _truth(source: Source, split: int) -> Judged:
    pairs = [(block.labels, block.truth) for block in source.blocks(split, source.num_lines)]
    labels, truth = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return scores(labels, truth)
