"""Where a step's time goes: the kernels of its compiled program, by the time they take.

Runs a scenario of `training_step.py`, or the step of `bags.py`, under JAX's profiler, and prints
for every kernel of the program its time in a step, how often it runs, and its share. Kernels that
run side by side count twice, and one that runs on several threads counts once: the sum is not the
step. A loop or a conditional counts what is inside of it again.

    pip install -e . && python benchmarks/kernels.py criteo
"""

import argparse
import collections
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bags
import jax
import numpy as np
from training_step import (
    CRITEO_SIZES,
    ONE,
    System,
    columns,
    limit_processors,
    many,
    seconds_of,
    single,
)

STEPS = 20
NO_KERNELS = ("ThunkExecutor", "ThreadpoolListener", "end: ", "CommonPjRt", "Handle inputs")


class Kernel(NamedTuple):
    """A kernel in all steps.

    Attributes:
      seconds: of all its runs.
      runs: how many.
    """

    seconds: float
    runs: int


def kernels(system: System, draws: np.ndarray) -> tuple[dict[str, Kernel], float, float]:
    """Name -> kernel; without the profiler, the median seconds of a step, and its page faults.

    Args:
      system: whose steps to look at.
      draws: [steps, ...], as its `prepare` takes them.
    """
    batches = [system.prepare(draw) for draw in draws]
    seconds_of(system, batches)  # the caches settle
    before = page_faults()
    seconds = seconds_of(system, batches)
    faults = (page_faults() - before) / len(batches)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds_of(system, batches)
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    found: dict[str, list[float]] = collections.defaultdict(list)
    for plane in profile.planes:
        for line in plane.lines:
            if line.name == "python":
                continue
            for event in line.events:
                if not event.name.startswith(NO_KERNELS):
                    found[event.name].append(event.duration_ns * 1e-9)
    made = {name: Kernel(sum(each), len(each)) for name, each in found.items()}
    return made, float(np.median(seconds)), faults


def page_faults() -> int:
    """Pages that this process was given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def one(*, row_wise: bool) -> System:
    """One feature of 1e7 ids, 4 collisions."""
    return single(ONE, 16384, row_wise=row_wise)


def criteo(*, row_wise: bool) -> System:
    """The 26 Criteo columns."""
    return many(columns(CRITEO_SIZES, 4, 16), 2048, row_wise=row_wise)


def of_bags(*, row_wise: bool) -> System:
    """26 columns of lists."""
    if row_wise:
        raise SystemExit("the step of bags.py is not row-wise.")
    return bags.qrhash_system()


SCENARIOS: dict[str, tuple[Callable[..., System], tuple[int, ...]]] = {
    "one": (one, (16384,)),
    "criteo": (criteo, (len(CRITEO_SIZES), 2048)),
    "bags": (of_bags, (bags.COLUMNS, bags.CAPACITY + bags.BAGS)),
}


def main() -> None:
    """Prints the kernels of a scenario."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--row-wise", action="store_true", help="one accumulator per row")
    parser.add_argument("--most", type=int, default=25, help="how many kernels to print")
    parser.add_argument("--threads", type=int, default=2, help="processors")
    args = parser.parse_args()
    limit_processors(args.threads)
    make, shape = SCENARIOS[args.scenario]
    found, seconds, faults = kernels(
        make(row_wise=args.row_wise), np.random.default_rng(0).random((STEPS, *shape))
    )
    print(f"{args.scenario}: {seconds * 1e3:.2f} ms a step, {len(found)} kernels, ", end="")
    print(f"{faults:.0f} page faults")
    print(f"{'microseconds':>12}{'of the step':>14}{'runs':>8}  kernel")
    for name, kernel in sorted(found.items(), key=lambda each: -each[1].seconds)[: args.most]:
        each = kernel.seconds / STEPS
        print(f"{each * 1e6:12.1f}{each / seconds:14.1%}{kernel.runs / STEPS:8.1f}  {name}")


if __name__ == "__main__":
    main()
