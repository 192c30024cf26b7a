"""All benchmarks of speed in one sitting, their figures kept, and compared with those of another.

Runs the scripts one after another, on whatever device JAX finds, and writes what each prints to
FOLDER/NAME.txt, and its figures, ratios against peers of the same run, to FOLDER/NAME.json. On a
GPU those that measure the CPU are left out. With --against, every ratio is printed beside the one
in another folder, such as figures/cpu-2026-11-29, which is of two cores of an AMD EPYC.

    pip install -e ".[bench]" && pip install --no-deps fbgemm-gpu-cpu==1.8.0
    python benchmarks/sitting.py --folder here --against benchmarks/figures/cpu-2026-11-29

It takes forty minutes on two cores, of which the three runs of `training_step.py` are twenty.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Script(NamedTuple):
    """A benchmark.

    Attributes:
      name: of its figures.
      arguments: the script's name, and what it is given.
      has_figures: whether it takes --json.
      is_of_cpu: whether it measures the CPU alone.
    """

    name: str
    arguments: tuple[str, ...]
    has_figures: bool = True
    is_of_cpu: bool = False


SCRIPTS = (
    *(Script(f"training_step-{run}", ("training_step.py",)) for run in (1, 2, 3)),
    Script("floor", ("floor.py",), is_of_cpu=True),
    Script("gathers", ("gathers.py",), has_figures=False),
    Script("lookup", ("lookup.py",), has_figures=False, is_of_cpu=True),
    Script("bags", ("bags.py",)),
    Script("dynamic", ("dynamic.py",)),
    Script("first_step", ("first_step.py",)),
    Script("creation", ("creation.py",), has_figures=False, is_of_cpu=True),
    Script("sharding", ("sharding.py",), has_figures=False, is_of_cpu=True),
    *(
        Script(f"kernels-{scenario}", ("kernels.py", scenario), has_figures=False)
        for scenario in ("one", "criteo", "bags")
    ),
)


def main() -> None:
    """Runs them, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the figures go")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in SCRIPTS])
    parser.add_argument("--against", type=Path, help="folder of another sitting")
    args = parser.parse_args()
    if args.against and not list(args.against.glob("*.json")):
        parser.error(f"--against must be a folder of figures, NAME.json, got {args.against}")
    args.folder.mkdir(parents=True, exist_ok=True)
    # Asked of a process of its own: this one would keep a GPU's memory from the others.
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    on_cpu = subprocess.check_output(asked, text=True).strip() == "cpu"
    chosen = [each for each in SCRIPTS if args.only is None or each.name in args.only]
    failed = []
    for script in chosen:
        if script.is_of_cpu and not on_cpu:
            print(f"{script.name}: of the CPU alone, left out")
        elif not succeeds(script, args.folder):
            failed.append(script.name)
    if args.against:
        compare(args.folder, args.against)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see what they wrote to {args.folder}")


def succeeds(script: Script, folder: Path) -> bool:
    """Runs a script; prints what it prints, and keeps it."""
    print(f"\n=== {script.name}", flush=True)
    file, *options = script.arguments
    command = [sys.executable, str(HERE / file), *options]
    if script.has_figures:
        command += ["--json", str(folder / f"{script.name}.json")]
    with (
        (folder / f"{script.name}.txt").open("w") as text,
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        for line in process.stdout or ():
            print(line, end="", flush=True)
            text.write(line)
    return process.returncode == 0


def compare(folder: Path, other: Path) -> None:
    """Prints every ratio that both have."""
    print(f"\n=== ratios, and those in {other}")
    for file in sorted(folder.glob("*.json")):
        if not (other / file.name).exists():
            continue
        before = dict(ratios(json.loads((other / file.name).read_text())))
        for name, ratio in ratios(json.loads(file.read_text())):
            if name in before:
                print(f"{file.stem:18}{name:50}{ratio:9.2f}{before[name]:9.2f}")


def ratios(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What was compared -> the ratio."""
    for scenario, lines in figures.items():
        for line in lines if isinstance(lines, list) else ():
            if "over" in line:
                yield f"{scenario}: {line['system']} over {line['over']}", line["ratio"]


if __name__ == "__main__":
    main()
