"""Every choice that depends on the platform, with the measurement behind it.

None of them changes what is computed (but for numbers below 1e-38), only how fast.
`benchmarks/tuning.py` measures each against its alternative, and the figures here are its own, of
two CPU cores. Where two platforms differ, `by_platform` leaves the choice to the lowering: a
program exported for several has both ways in it, and one compiled for a GPU while the process's
default is the CPU has the GPU's.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

CPU, ACCELERATOR = "cpu", "accelerator"

# Rows from which on a table is trained by rows, and split over a mesh. One with fewer is updated
# faster as a whole: with 2,048 look-ups a step up to some 2,000 rows, with 16,384 up to some 30,000
# (one of 16,384 rows: 1.9 times as fast by rows with the former, 0.7 times with the latter).
LARGE_TABLE_ROWS = 16384

# Entries of the one-hot matrix of one product, at most: 256 MB of float32.
ONE_HOT_ENTRIES = 2**26

# Slots of the scratch in which duplicates are found by hashing, for each look-up: with 4, nine
# positions in ten are settled in the first round. From 1 to 16 the time is the same within 7 %. But
# a scratch beyond the caches costs more than another round: of 612,352 look-ups duplicates are
# found in two thirds of the time with as many slots as there are look-ups.
SLOTS_PER_LOOKUP = 4
MOST_SPARE_SLOTS = 2**20

# Rows of a table, for each look-up, up to which every row has a slot of its own, and nothing is
# hashed or tried again. Of 2,048, 16,384 and 524,288 look-ups hashing takes 2.3 to 4 times as long
# with 4 rows for each, .9 to 2.1 times with 8, 1.2 to 1.9 times with 12, .8 to 1.8 with 16.
ROWS_PER_LOOKUP = 12

# Places of bags that are summed up at once: their rows stay in the caches. With 8,192 a step of
# 524,288 ids in bags takes 1.01 times as long; with 32,768, in twice the memory, 0.96 times.
PLACES_AT_ONCE = 16384

# Features next to each other whose vectors are joined with others as one piece. Of 26,
# thirteen of a kind together, a look-up takes 1.2 times as long with each by itself, 1.3 times with
# 2 and .93 times with 8; with its gradient .97, 1.05 and 1.15 times.
NEIGHBOURS_AT_ONCE = 4

# Touched rows that are updated at once, where there are several times as many.
ROWS_AT_ONCE = 8192

# Random numbers drawn at once: bits on their way need several times the memory of a table. Creating
# 5e7 x 16 rows peaked at 13 GB in one go, at 6.7 GB in blocks of this size, at no loss of speed.
DRAWN_AT_ONCE = 2**22

# And at least: of a table of few rows, in a long stack of many features. The tables of 520 features
# with 270 million entries are created in a sixth of the time.
FEWEST_DRAWN = 2**13


def one_hot_rows(platform: str) -> int:
    """Up to how many rows a table's gradient is a product with one-hot rows, and no scatter-add.

    On an accelerator a scatter-add of a batch's rows waits for itself at every duplicate (2048 is
    an estimate: it was not measured on one). On the CPU it is a plain loop over rows, and faster
    for a table of any length: 1.2 times for 4 rows, 3.5 times for 64.
    """
    return 0 if platform == CPU else 2048


def merge_method(platform: str) -> str:
    """How rows named several times are summed: by "hash" or by "sort".

    On the CPU hashing is 3 times as fast for 2,048 look-ups, 8 times for 16,384. On a GPU sums
    after hashing need atomics, in no fixed order; sorting is deterministic (not measured there).
    """
    return "hash" if platform == CPU else "sort"


def gathers_again(platform: str) -> bool:
    """Whether the derivative of a look-up in small tables gathers the rows it needs again.

    On the CPU rows of small tables come faster from the tables, in its caches, than from where the
    look-up would have kept them: a step is 1.5 times as fast on two tables of 1,000 or 10,000 rows.
    """
    return platform == CPU


def updates_in_blocks(platform: str, rows: int) -> bool:
    """Whether so many touched rows are updated block by block.

    Of 131,072 ids in bags a step is 1.6 times as fast, of 65,536 1.07 times. On an accelerator a
    loop over blocks would be slower than one pass over all rows (not measured there).
    """
    return platform == CPU and rows >= 8 * ROWS_AT_ONCE


def sums_at_once(platform: str, places: int) -> bool:
    """Whether bags are summed up some places at a time, and their rows are gathered again.

    A step of Adagrad on 32,768 ids in bags is as fast so, on 131,072 ids twice as fast. On an
    accelerator the loop would be slow, and its sums in no fixed order (not measured there).
    """
    return platform == CPU and places >= 2 * PLACES_AT_ONCE


def multiplies_gathered(platform: str, width: int) -> bool:
    """Whether a look-up multiplies its rows by 1, or by 0 for an id without a row.

    On the CPU rows of 57 to 72 entries are gathered in a quarter of the time so: it seems that LLVM
    unrolls the loop over a row else, and does not vectorize it. Shorter ones take up to 1.5 times
    as long, longer ones as long.
    """
    return platform == CPU and 56 < width < 73


def gathers_apart(platform: str, width: int) -> bool:
    """Whether rows of two tables that bags multiply are gathered one table after another.

    On the CPU a look-up of 524,288 ids in bags takes 1.3 to 1.4 times as long otherwise, of 8 or 16
    entries in a row; of 32 or 48 .9 to 1.0 times, of 64 a third.
    """
    return platform == CPU and width < 32


def by_platform(
    choose: Callable[[str], Hashable],
    fun: Callable[..., Any],
    static: tuple[Hashable, ...],
    *args: Any,
) -> Any:
    """Runs, on every platform, what is chosen for it.

    Args:
      choose: platform, `CPU` or `ACCELERATOR` -> choice.
      fun: (choice, *static, *args) -> arrays, of the same types for every choice.
      static: what is known before tracing.
      *args: trees of arrays.
    """
    on_cpu, elsewhere = choose(CPU), choose(ACCELERATOR)
    if on_cpu == elsewhere:
        return fun(on_cpu, *static, *args)
    return _when_lowered(fun, on_cpu, elsewhere, static, *args)


# Jitted for its cache: outside of `jax.jit`, JAX would compile both branches anew at every call.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _when_lowered(
    fun: Callable[..., Any],
    on_cpu: Hashable,
    elsewhere: Hashable,
    static: tuple[Hashable, ...],
    *args: Any,
) -> Any:
    return jax.lax.platform_dependent(
        *args,
        cpu=functools.partial(fun, on_cpu, *static),
        default=functools.partial(fun, elsewhere, *static),
    )


def traced_for() -> str:
    """The platform that a computation is most likely traced for.

    For choices that shape the program before it is lowered, such as what a derivative keeps: of
    the mesh in use, of `jax.default_device`, or the process's default.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = device or getattr(jax.config, "jax_default_device", None)
    if device is None:
        platform = jax.default_backend()
    else:
        platform = device if isinstance(device, str) else device.platform
    return CPU if platform == CPU else ACCELERATOR
