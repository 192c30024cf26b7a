"""Several processes as threads of one: what they exchange through JAX, they exchange here."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils


def in_processes(count, function):
    """What `function` gives in each of so many processes, by their numbers."""
    here, barrier, told = threading.local(), threading.Barrier(count, timeout=60), [None] * count

    def allgather(array):
        told[here.number] = np.array(array)
        barrier.wait()
        found = np.stack(told)
        barrier.wait()
        return found

    def run(number):
        here.number = number
        try:
            return function()
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: here.number)
        patch.setattr(multihost_utils, "process_allgather", allgather)
        running = [pool.submit(run, number) for number in range(count)]
        with contextlib.suppress(threading.BrokenBarrierError):
            return [each.result() for each in running]
        raise AssertionError("One process waited for another that had left.")
