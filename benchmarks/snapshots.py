"""Snapshots: how fast they start and look up, what rows in fewer bits cost, and torn reads.

Four parts, each by its flag, all of them by default:

    --start    a new process imports what looks up, opens a snapshot and looks up once; against one
               that imports NumPy, and one that imports JAX, in turns. Milliseconds.
    --lookups  26 embeddings, batches of 1 to 1000 rows: p50 and p99 of `lookup_all`, and of NumPy
               taking rows of full tables of as many ids, which is the least that a look-up costs.
    --formats  a run of `qrhash train` (--run DIR): its test log loss with the rows of its tables as
               each format keeps them.
    --torn     for --seconds one thread applies deltas, and eight look up: reads of two versions at
               once, and keys that are found after they were removed, are counted.

    pip install -e ".[train]" && python benchmarks/snapshots.py --run runs/first
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import qrhash
from qrhash import dynamic, export
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import batches
from qrhash.ctr.model.metrics import scores
from qrhash.ctr.run.again import opened
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.trained import kept_of, load_trained
from qrhash.export import row_formats

_OPEN = "from qrhash.export import Snapshot; Snapshot({!r}).lookup([1, 2, 3], 'f0')"


def _saved(path: Path, *, num_features: int, num_ids: int, width: int) -> None:
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(num_ids, 4), width)
    tables = qrhash.init(jax.random.key(0), config)
    exported = export.of_feature(config, tables)
    export.save(path, {f"f{j}": exported for j in range(num_features)})


def start(path: Path, rounds: int) -> None:
    """Prints how long new processes take."""
    codes = {"python": "pass", "numpy": "import numpy", "snapshot": _OPEN.format(str(path))}
    codes["jax"] = "import jax.numpy"
    taken: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken[name].append(1e3 * (time.perf_counter() - began))
    print("\na new process, ms (median, least of", rounds, "rounds)")
    for name, each in taken.items():
        print(f"  {name:<10}{np.median(each):8.0f}{min(each):8.0f}")


def lookups(path: Path, num_ids: int, width: int, calls: int) -> None:
    """Prints how long look-ups take."""
    snapshot, rng = export.Snapshot(path), np.random.default_rng(0)
    full = [rng.normal(size=(num_ids, width)).astype(np.float32) for _ in snapshot.names]
    print(f"\n{len(full)} embeddings of {num_ids:,} ids, width {width}, ms")
    print("  rows   snapshot p50      p99   NumPy p50      p99   ratio of p50")
    for rows in (1, 100, 1000):
        taken: dict[str, list[float]] = {"snapshot": [], "numpy": []}
        for _ in range(calls):
            shape = (len(full), rows)
            ids = np.exp(rng.uniform(0, np.log(num_ids), shape)).astype(np.int64) - 1
            began = time.perf_counter()
            snapshot.lookup_all(dict(zip(snapshot.names, ids, strict=True)))
            middle = time.perf_counter()
            _ = [table[each] for table, each in zip(full, ids, strict=True)]
            taken["snapshot"].append(1e3 * (middle - began))
            taken["numpy"].append(1e3 * (time.perf_counter() - middle))
        ours, theirs = (np.percentile(each, [50, 99]) for each in taken.values())
        print(
            f"{rows:6,}{ours[0]:15.3f}{ours[1]:9.3f}{theirs[0]:12.3f}{theirs[1]:9.3f}"
            f"{ours[0] / theirs[0]:12.2f}"
        )


def formats(run: Path) -> None:
    """Prints the test log loss of a run with the rows of each format."""
    display = Display(Console(stderr=True, quiet=True))
    kept = kept_of(run)
    read = opened(kept, None, BadLines(0, display.line), display)
    trained = load_trained(kept, display)
    (embeddings,) = trained.learner.model.all_embeddings
    own = embeddings.columns.tables
    print(f"\n{run}: log loss of the test rows, and the bytes of the tables")
    first = None
    for rows in export.ROW_FORMATS:
        num_bytes = 0

        def kept_as(table: jax.Array, rows: str = rows) -> np.ndarray:
            nonlocal num_bytes
            arrays = row_formats.encode(np.asarray(table, np.float32), rows)
            num_bytes += sum(array.nbytes for array in arrays.values())
            of_file = row_formats.Rows(arrays, table.shape[1])
            return of_file.take(np.arange(table.shape[0])).astype(table.dtype)

        tables = {name: tuple(map(kept_as, each)) for name, each in own.items()}
        model = trained.learner.model
        (embeddings,) = model.all_embeddings
        embeddings.columns.set_tables(tables)
        score = jax.jit(lambda batch, model=model: model(*batch))
        logits, labels = [], []
        size = kept.settings.batch_size
        with batches(read.scored, *read.lines, trained.ids, size) as stream:
            for batch in stream:
                real = batch.weights > 0
                found = score((batch.numbers, batch.ids, batch.keys, batch.lists))
                logits.append(np.asarray(found)[real])
                labels.append(batch.labels[real])
        loss = scores(np.concatenate(labels), np.concatenate(logits)).log_loss
        first = loss if first is None else first
        print(f"  {rows:<10}{loss:.6f}  {100 * (loss / first - 1):+.4f} %{num_bytes:14,} bytes")


def torn(path: Path, seconds: float) -> None:
    """Prints what readers saw while deltas were applied."""
    features, keys = 16, np.arange(20_000, dtype=np.uint64)
    config = dynamic.DynamicConfig(len(keys), features)
    params, state = dynamic.init(jax.random.key(0), config), dynamic.init_state(config)
    export.save(path, export.of_dynamic(config, params, state, 1))
    snapshot = export.Snapshot(path)

    def delta(version: int) -> dynamic.Delta:
        # All vectors hold the version; every other version the first hundred keys have no row.
        removed = keys[: 100 * (version % 2)]
        held = keys[removed.size :]
        none = np.zeros(held.size, np.int32)
        return dynamic.Delta(
            from_version=np.int64(version - 1),
            to_version=np.int64(version),
            keys=held,
            vectors=np.full((held.size, features), version, np.float32),
            counts=none,
            last_steps=none,
            removed=removed,
        )

    snapshot.apply(delta(2))
    seen, is_over = {"reads": 0, "torn": 0, "missed removals": 0, "older": 0}, threading.Event()
    lock = threading.Lock()

    def look() -> None:
        rng, latest = np.random.default_rng(), 0.0
        while not is_over.is_set():
            applied = snapshot.version()
            some = np.concatenate([keys[:100], rng.choice(keys[100:], 900)])
            found = snapshot.lookup(some)
            version = found[-1, 0]
            first = 0 if version % 2 else version
            with lock:
                seen["reads"] += 1
                seen["torn"] += not (found[100:] == version).all()
                seen["missed removals"] += not (found[:100] == first).all()
                seen["older"] += bool(version < max(latest, applied or 0))
            latest = version

    readers = [threading.Thread(target=look) for _ in range(8)]
    for each in readers:
        each.start()
    version, until = 2, time.monotonic() + seconds
    while time.monotonic() < until:
        version += 1
        snapshot.apply(delta(version))
    is_over.set()
    for each in readers:
        each.join()
    print(f"\n{version - 2:,} deltas of 20,000 keys in {seconds:.0f} s, eight readers: {seen}")


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="directory of a run, for --formats")
    for name in ("start", "lookups", "formats", "torn"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--num-ids", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=16)
    args = parser.parse_args()
    every = not (args.start or args.lookups or args.formats or args.torn)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "snapshot.safetensors"
        if every or args.start or args.lookups:
            _saved(path, num_features=26, num_ids=args.num_ids, width=args.width)
        if every or args.start:
            start(path, args.rounds)
        if every or args.lookups:
            lookups(path, args.num_ids, args.width, args.calls)
        if args.run is not None and (every or args.formats):
            formats(args.run)
        if every or args.torn:
            torn(Path(directory) / "growing.safetensors", args.seconds)


if __name__ == "__main__":
    main()
