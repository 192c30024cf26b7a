"""`qrhash compare`: the same training with other embeddings, sizes and seeds.

Every training is a run in a directory and a process of its own, so that several go on at a time,
and what is finished stays finished: the comparison begins with full tables, whose bytes the others
are measured by, and goes on where it was stopped.
"""

import io
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from qrhash.ctr.compare_settings import FULL, METHODS, NOT_COMPARED, CompareOptions, check_base
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import build
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.report import METRICS, RunDirectory
from qrhash.ctr.run.train import fit
from qrhash.ctr.settings import Settings
from qrhash.tuning import ACCELERATOR, traced_for

BASIS, RUNS = "comparison.json", "runs"
_CORES_EACH = 2


class Trial(NamedTuple):
    """One training of a comparison.

    Attributes:
      method: of `METHODS`.
      times: how many times fewer bytes than full tables; 1 for these.
      seed: of the training.
    """

    method: str
    times: float
    seed: int

    @property
    def name(self) -> str:
        """That of its directory."""
        size = "" if self.method == FULL else f"-{self.times:g}x"
        return f"{self.method}{size}-seed{self.seed}"


class Outcome(NamedTuple):
    """What came of a trial.

    Attributes:
      trial: which one.
      summary: the last record of its run; empty, if there can be none.
      reason: why there can be none.
    """

    trial: Trial
    summary: dict[str, Any]
    reason: str = ""


def compare(settings: Settings, options: CompareOptions, display: Display) -> list[Outcome]:
    """Trains whatever is not yet trained.

    Args:
      settings: of all trainings, without what they are compared by.
      options: what is compared.
      display: is told of each that is finished.

    Returns:
      What came of each, in the order of methods, sizes and seeds.

    Raises:
      UserError: the options do not fit, or are not those that the directory was begun with; or a
        training with full tables failed.
    """
    check_base(settings)
    directory = Path(options.output_dir)
    _begin(directory, settings, _source_of(settings, display), display)
    seeds = range(options.seeds)
    first = [Trial(FULL, 1, seed) for seed in seeds]
    others = [
        Trial(method, times, seed)
        for method in options.chosen[1:]
        for times in options.times
        for seed in seeds
    ]
    outcomes = _finished(directory, (*first, *others))
    jobs = _Jobs(directory, settings, options.jobs, display, len(first) + len(others))
    jobs.skip(len(outcomes))
    display.line(f"{len(first) + len(others)} trainings, {len(outcomes)} of them done before")
    # The first one alone: by it is known what a training takes, and what full tables have.
    for some in (first[:1], first[1:], others):
        full = outcomes.get(first[0])
        full_bytes = full.summary["full_bytes"] if full else 0
        outcomes |= jobs.run([each for each in some if each not in outcomes], full_bytes)
        failed = [outcomes[each].reason for each in first if each in outcomes]
        if any(failed):
            raise UserError(next(filter(None, failed)))
    display.done()
    return [outcomes[each] for each in (*first, *others)]


def _source_of(settings: Settings, display: Display) -> dict[str, int] | None:
    """What data there are; what is wrong with them is told before anything is written."""
    if settings.data is None:
        return None
    display.phase("counting the rows", 0)
    source = open_source(settings, BadLines(settings.max_bad_lines, _say_nothing), _say_nothing)
    return {"lines": source.num_lines, "checksum": source.checksum}


def _say_nothing(line: str) -> None:
    """Every training says it."""


def _begin(
    directory: Path, settings: Settings, source: dict[str, int] | None, display: Display
) -> None:
    """Makes the directory, or holds what is in it against the settings and the data."""
    basis = directory / BASIS
    wanted = json.loads(json.dumps({"source": source, **settings.as_dict()}))
    if basis.exists():
        try:
            begun = json.loads(basis.read_text())
        except ValueError as error:
            raise UserError(f"{basis} is no record of a comparison: {error}.") from error
        shared = [name for name in wanted if name not in NOT_COMPARED]
        other = [name for name in shared if wanted[name] != begun.get(name)]
        if not other:
            display.line(f"going on with the comparison in {directory}")
            return
        if any(directory.glob(f"{RUNS}/*/{METRICS}")):
            what = f"with {other[0]}={begun.get(other[0])!r}, got {wanted[other[0]]!r}"
            if other[0] == "source":
                what = f"of other data than {settings.data} has now"
            raise UserError(f"{directory} holds a comparison {what}: choose another --output-dir.")
    elif directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} holds something else: choose another --output-dir.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{BASIS}.part"
        part.write_text(json.dumps(wanted) + "\n")
        part.replace(basis)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}.") from error


def _finished(directory: Path, trials: Sequence[Trial]) -> dict[Trial, Outcome]:
    """What came of those that were trained before."""
    found: dict[Trial, Outcome] = {}
    for trial in trials:
        metrics = directory / RUNS / trial.name / METRICS
        try:
            last = json.loads(metrics.read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            continue
        if last.get("kind") == "summary":
            found[trial] = Outcome(trial, last)
    return found


class _Jobs:
    """Runs trials, several at a time.

    Args:
      directory: of the comparison.
      settings: of all trials.
      jobs: how many at a time; None: as many as memory allows.
      display: is told of each that is finished.
      total: how many trials there are in all.
    """

    def __init__(
        self, directory: Path, settings: Settings, jobs: int | None, display: Display, total: int
    ) -> None:
        self._directory, self._settings, self._jobs = directory, settings, jobs
        self._display, self._total = display, total
        self._peak, self._done = 0.0, 0
        display.phase("trainings", total)

    def skip(self, trials: int) -> None:
        """So many were trained before."""
        self._done += trials
        self._display.move(self._done)

    def run(self, trials: Sequence[Trial], full_bytes: int) -> dict[Trial, Outcome]:
        """What came of them."""
        found: dict[Trial, Outcome] = {}
        for outcome, peak in self._outcomes(trials, full_bytes):
            self._peak = max(self._peak, peak)
            found[outcome.trial] = outcome
            self._done += 1
            said = outcome.reason or f"test log loss {outcome.summary['test_log_loss']:.4f}"
            self._display.line(f"{self._done} of {self._total}, {outcome.trial.name}: {said}")
            self._display.move(self._done)
        return found

    def _outcomes(
        self, trials: Sequence[Trial], full_bytes: int
    ) -> Iterator[tuple[Outcome, float]]:
        """Of each its outcome, and how much memory it took, as they come."""
        # Forked processes would have the threads of JAX's backend, which do not survive it.
        context = multiprocessing.get_context("spawn")
        left = list(trials)
        running: dict[connection.Connection, tuple[Any, Trial]] = {}
        try:
            while left or running:
                while left and self._has_room_beside(len(running)):
                    trial = left.pop(0)
                    here, there = context.Pipe(duplex=False)
                    arguments = (there, asdict(self._settings), trial, full_bytes, self._directory)
                    process = context.Process(target=_send, args=arguments, daemon=True)
                    process.start()
                    there.close()  # That its end is the end of what is sent.
                    running[here] = (process, trial)
                for ready in connection.wait(list(running)):
                    assert isinstance(ready, connection.Connection)
                    process, trial = running.pop(ready)
                    try:
                        sent = ready.recv()
                    except EOFError as error:
                        raise UserError(
                            f"{trial.name} was killed: too little memory, perhaps; go on with "
                            "fewer --jobs."
                        ) from error
                    finally:
                        process.join()
                        ready.close()
                    if isinstance(sent, str):
                        raise UserError(f"{trial.name} failed: {sent}")
                    yield sent
        finally:
            for process, _ in running.values():
                process.terminate()
                process.join()

    def _has_room_beside(self, running: int) -> bool:
        """Whether one more training may begin beside so many."""
        if self._jobs is not None:
            return running < self._jobs
        # Of the first it is to be known what one takes.
        if not running or not self._peak or running >= (os.cpu_count() or 1) // _CORES_EACH:
            return not running
        return _free_memory() > 1.2 * self._peak


def _free_memory() -> int:
    """Bytes that a process could take; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * sum(kilobytes)


def _send(
    there: connection.Connection,
    values: dict[str, Any],
    trial: Trial,
    full_bytes: int,
    directory: Path,
) -> None:
    """A training in a process of its own, which sends what came of it.

    Interrupts are left to the process that asks for trainings, and ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        there.send(_train(values, trial, full_bytes, directory))
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}")
        raise


def _train(
    values: dict[str, Any], trial: Trial, full_bytes: int, directory: Path
) -> tuple[Outcome, float]:
    """Trains; what came of it, and how many bytes it took at most of what all share."""
    path = directory / RUNS / trial.name
    if path.exists():  # Of a training that was stopped.
        shutil.rmtree(path)
    console = Console(file=io.StringIO())
    try:
        settings = build(Settings, values, str(directory))
        of_trial = METHODS[trial.method](trial.times, full_bytes)
        settings = replace(
            settings,
            **of_trial,
            seed=trial.seed,
            checkpoint_every=0 if not settings.validation_fraction else None,
            output_dir=str(path),
        )
        with RunDirectory(settings.output_dir) as run, Display(console) as display:
            summary = fit(settings, display, run).as_record()
        outcome = Outcome(trial, summary)
    except UserError as error:
        outcome = Outcome(trial, {}, str(error))
    if traced_for() == ACCELERATOR:  # whose memory the first one takes
        return outcome, math.inf
    unit = 1 if sys.platform == "darwin" else 1024
    return outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
