"""Forward look-up of one feature against PyTorch, side by side in one run.

One feature of 1e7 ids, 4 collisions, features 64, operation mult, batches of 16384 log-uniform
ids, float32 on the CPU. The peer is PyTorch's two `F.embedding` calls, on id // 4 and id % 4, and
their product. Both get the same ids, each batch fresh; their turns alternate in blocks, because
the two libraries' thread pools disturb each other when single calls do; the figure is the median
over blocks of the ratio of the block medians. "one table" is a single `F.embedding` call on the
large table with the quotients given: what it costs to fetch the rows at all.

    pip install -e ".[bench]" && python benchmarks/lookup.py
"""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import qrhash

_Batch = TypeVar("_Batch")


def block_median(call: Callable[[_Batch], object], batches: Iterable[_Batch]) -> float:
    """Median seconds of a call over fresh batches, the first few not counted."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        call(batch)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[4:]))


def main() -> None:
    """Prints both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-embeddings", type=int, default=10_000_000)
    parser.add_argument("--collisions", type=int, default=4)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16384)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--calls", type=int, default=40, help="calls per block")
    args = parser.parse_args()

    partition = qrhash.QuotientRemainder(args.num_embeddings, args.collisions)
    config = qrhash.EmbedConfig(partition, args.features, "mult")
    tables = qrhash.init(jax.random.key(0), config)
    weight_q, weight_r = (torch.rand(*shape) for shape in config.table_shapes)
    lookup = jax.jit(lambda tables, ids: qrhash.lookup(tables, ids, config))

    def ours(ids: jax.Array) -> None:
        lookup(tables, ids).block_until_ready()

    def peer(ids: torch.Tensor) -> torch.Tensor:
        quotient, remainder = ids // args.collisions, ids % args.collisions
        return F.embedding(quotient, weight_q) * F.embedding(remainder, weight_r)

    def one_table(quotient: torch.Tensor) -> torch.Tensor:
        return F.embedding(quotient, weight_q)

    rng = np.random.default_rng(0)
    log_size, shape = np.log(args.num_embeddings), (args.calls, args.batch_size)
    seconds: dict[str, list[float]] = {"qrhash": [], "torch": [], "one table": []}
    with torch.inference_mode():
        for _ in range(args.blocks):
            ids = np.exp(rng.uniform(0, log_size, shape)).astype(np.int64) - 1
            jax_ids = [jnp.asarray(batch, jnp.int32) for batch in ids]
            torch_ids = [torch.from_numpy(batch) for batch in ids]
            seconds["qrhash"].append(block_median(ours, jax_ids))
            seconds["torch"].append(block_median(peer, torch_ids))
            quotients = [batch // args.collisions for batch in torch_ids]
            seconds["one table"].append(block_median(one_table, quotients))

    for name, medians in seconds.items():
        low, middle, high = np.percentile(medians, [0, 50, 100]) * 1e3
        print(f"{name:9} median {middle:.3f} ms per batch (blocks from {low:.3f} to {high:.3f})")
    for name in ("torch", "one table"):
        ratios = np.array(seconds[name]) / np.array(seconds["qrhash"])
        low, middle, high = np.percentile(ratios, [0, 50, 100])
        print(f"{name} / qrhash: {middle:.2f}x (blocks from {low:.2f} to {high:.2f})")
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
