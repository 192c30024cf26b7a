"""A step on 8 to 1,024 devices, on paper: bytes from the layout, times from data sheets.

Criteo's 26 columns, features 16, float32, 2,048 rows of the batch on each device, all tables split
by rows over all devices. For the two exchanges, and for what TorchRec does with tables split by
rows or given to devices whole (its sharding types ROW_WISE and TABLE_WISE: Ivchenko et al., RecSys
2022), the bytes that a device receives in a step, forward and backward, and the milliseconds that
takes at the rates of the data sheets, which no program quite reaches:

  GPU  H100: 450 GB/s each way to 7 others by NVLink; 50 GB/s to all others (400 Gb/s InfiniBand);
       memory 3,350 GB/s
  TPU  v6e: a torus of two dimensions, 4 links of 100 GB/s each way; memory 1,600 GB/s. A chip can
       send 4 * 100 / n GB/s to all others of an n x n torus at once (its bisection), and 400 GB/s
       to its neighbours, as reductions do. 256 chips at most; more are joined by 12.5 GB/s each.

To each message a latency is added, --latency microseconds, which is assumed and in no data sheet.
"rows" is the time to read and write the rows of a step in the device's memory.

    python benchmarks/scaling.py
"""

import argparse
import math
import os
from collections.abc import Callable
from typing import NamedTuple

COLUMNS, FEATURES, BATCH = 26, 16, 2048
ROW = 4 * FEATURES
POD = 256


class Exchange(NamedTuple):
    """What a device does in a step.

    Attributes:
      to_all: bytes that it receives from all others, each its own.
      along: bytes that it receives in reductions and gathers, which may go by neighbours.
      messages: how many messages.
    """

    to_all: float
    along: float
    messages: float


def exchanges(devices: int) -> dict[str, Exchange]:
    """By name, for so many devices."""
    import jax
    from jax.sharding import AxisType

    import qrhash
    from qrhash.exchange import bytes_received

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    layout = qrhash.MeshLayout(mesh=mesh)
    lookups = BATCH * COLUMNS
    ours = bytes_received(layout, lookups, ROW)
    others = devices - 1
    share = others / devices
    return {
        "reduce": Exchange(0, ours["reduce"], 3 * others),
        "all_to_all": Exchange(ours["all_to_all"], 0, 3 * others),
        # Ids to where the rows are, sums of all devices scattered; the gradients gathered.
        "TorchRec, by rows": Exchange(8 * lookups * share, 2 * lookups * ROW * others, 3 * others),
        # Ids to the tables, vectors back, their gradients there.
        "TorchRec, by tables": Exchange((8 + 2 * ROW) * lookups * share, 0, 3 * others),
    }


def gpu(each: Exchange, devices: int, latency: float) -> float:
    """Seconds on H100s, 8 in a host."""
    far = max(0, devices - 8) / max(1, devices - 1)
    to_all = each.to_all * ((1 - far) / 450e9 + far / 50e9)
    return to_all + each.along / (450e9 if devices <= 8 else 50e9) + each.messages * latency


def tpu(each: Exchange, devices: int, latency: float) -> float:
    """Seconds on TPU v6e."""
    side = math.sqrt(min(devices, POD))
    far = max(0, devices - POD) / devices
    to_all = each.to_all * ((1 - far) * side / 400e9 + far / 12.5e9)
    return to_all + each.along / (400e9 if devices <= POD else 12.5e9) + each.messages * latency


MACHINES: dict[str, tuple[Callable[[Exchange, int, float], float], float]] = {
    "GPU": (gpu, 3350e9),
    "TPU": (tpu, 1600e9),
}


def main() -> None:
    """Prints a table for each machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=1.0, help="microseconds of a message")
    args = parser.parse_args()
    sizes = [2**power for power in range(3, 11)]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(sizes)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Row and accumulator of each look-up, read and written; and a row and its gradient.
    moved = 6 * ROW * BATCH * COLUMNS
    for machine, (seconds, memory) in MACHINES.items():
        names = list(exchanges(sizes[0]))
        print(f"\n{machine}, rows {moved / memory * 1e3:.3f} ms; MB received, and ms")
        print(f"{'devices':>8}" + "".join(f"{name:>22}" for name in names))
        for devices in sizes:
            row = f"{devices:8}"
            for each in exchanges(devices).values():
                time = seconds(each, devices, args.latency * 1e-6)
                row += f"{(each.to_all + each.along) / 1e6:12,.1f}{time * 1e3:10.2f}"
            print(row)


if __name__ == "__main__":
    main()
