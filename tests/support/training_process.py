"""Trainings for tests of whole runs: in this process, and in processes of their own.

Started as a script, this file is a nursery of trainings that only save, to be killed:

    python training_process.py DIRECTORY

For each line that it reads it forks a child, which takes up the last checkpoint and saves on. To
import JAX takes seconds; a fork takes none, and is safe as long as no backend is in use.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.compilation_cache import compilation_cache

import qrhash
from qrhash.checkpoint import Checkpoints

# --- whole runs -----------------------------------------------------------------------------------

# 13 steps in each of two epochs; the tables of C1 and C2 are of 13 and 4 rows.
SMALL = """
features = 4
bottom_mlp = "8"
top_mlp = "8"
batch_size = 64
threshold = 20
large_table_rows = 10
init_stddev = 0.35
table_lr = 0.3
dense_lr = 0.01
epochs = 2
evaluations = 6
eval_rows = 100
"""
ROWS, STEPS = 1000, 26
LEFT_OUT = "[columns.C{}]\npartition = 'drop'\nhash_size = 2\n"

QUICK = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@contextlib.contextmanager
def compiled_once(directory):
    """What one training of a test compiles, the others take over: it is most of their time."""
    wanted = QUICK | {"jax_compilation_cache_dir": str(directory)}
    before = {name: jax.config.values[name] for name in wanted}

    def configure(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    configure(wanted)
    yield
    configure(before)


def small_run(directory, *, name="clicks", rows=None):
    """The options of a small run, in many blocks of data."""
    from support import ctr_files

    config, data = directory / "small.toml", directory / name
    config.write_text(SMALL + "".join(map(LEFT_OUT.format, range(3, 27))))
    if rows is None:
        ctr_files.write_parquet(data, ctr_files.random_rows(ROWS))
    else:
        ctr_files.write_text(data, rows)
    return [f"--config={config}", f"--data={data}"]


def train(*arguments):
    """`qrhash train` in this process: the result, with its exit code and its output."""
    from typer.testing import CliRunner

    from qrhash import cli

    arguments = ["train", *map(str, arguments)]
    env = {"COLUMNS": "200"}
    return CliRunner().invoke(cli.build_app(), arguments, env=env, catch_exceptions=False)


# Says at the end how many rows were decoded.
COUNTED = """
import atexit
from qrhash.ctr.data import sources
decode, counts = sources.decode, []
def counted(table, schema):
    counts.append(table.num_rows)
    return decode(table, schema)
sources.decode = counted
atexit.register(lambda: print("decoded", sum(counts)))
"""


def command_line(*arguments, output, devices=8, before=""):
    """`qrhash train` as a process on so many devices, compiled as in `compiled_once`.

    What stands in `before` is done first.
    """
    names = [*QUICK, "jax_compilation_cache_dir"]
    env = {name.upper(): str(jax.config.values[name]) for name in names}
    of_devices = "--xla_force_host_platform_device_count="
    env["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(f"{of_devices}8", f"{of_devices}{devices}")
    code = f"{before}\nfrom qrhash.cli import main; main()"
    with Path(output).open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, "train", *map(str, arguments)],
            env=os.environ | env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def until(is_done, processes, seconds):
    """Returns when it is done; ends the processes if one fails or all that takes too long."""
    end = time.monotonic() + seconds
    try:
        while not is_done():
            codes = [process.poll() for process in processes]
            assert not any(codes), f"exit codes {codes}"
            assert time.monotonic() < end, f"not done after {seconds} s, exit codes {codes}"
            time.sleep(0.05)
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise


def numbers_of(directory):
    """The records of a run, without how long it took."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    times = ("seconds", "rows_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def assert_same_to_the_last_bit(got, want):
    """That two directories hold the same records, and the same last checkpoint."""
    assert numbers_of(got)[1:] == numbers_of(want)[1:]
    arrays = [_last_arrays(directory) for directory in (got, want)]
    assert len(jax.tree.leaves(arrays[0])) > 10
    jax.tree.map(np.testing.assert_array_equal, *arrays)


def _last_arrays(directory):
    """Parameters and state of the last checkpoint."""
    last = max((directory / "checkpoints").iterdir(), key=lambda path: int(path.name))
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = reader.metadata(last / "state").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(last / "state", restore_args=as_numpy)


def assert_same_curve(got, want):
    """That two runs have the same points and the same scores, up to rounding."""
    import pytest

    assert [record["kind"] for record in got] == [record["kind"] for record in want]
    for record, other in zip(got[1:], want[1:], strict=True):
        for name in other:
            if name.endswith("rows"):
                assert record[name] == other[name]
            elif name.endswith("log_loss"):
                assert record[name] == pytest.approx(other[name], rel=1e-5), name
            elif name.endswith("auc"):  # Of rows that score alike either may come first.
                assert record[name] == pytest.approx(other[name], abs=2e-3), name


# --- trainings that only save ---------------------------------------------------------------------

CONFIG = qrhash.EmbedConfig(qrhash.QuotientRemainder(1003, 3), 8)


def state_of(step):
    """4 MB, in which every number is the step."""
    names = ("table", "full", "row-wise")
    arrays = {name: np.full((512, 682), step, np.float32) for name in names}
    return jax.device_put(arrays | {"steps": np.int32(step)})


def _save_on(directory):
    """Says from which step on it goes, and each step that is on disk."""
    checkpoints = Checkpoints(directory, CONFIG, max_to_keep=2)
    restored = checkpoints.restore(state_of(0))
    assert all((each == restored.step).all() for each in jax.tree.leaves(restored.state))
    step = restored.step
    print(os.getpid(), step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_of(step), {"step": step})
        checkpoints.wait()
        print(step, flush=True)


def nurse(save_on, directory):
    """For each line that comes in, a child that saves on until it is killed."""
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            try:
                save_on(directory)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    nurse(_save_on, sys.argv[1])
