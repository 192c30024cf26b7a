"""Eight host devices and strict settings, set before jax is imported."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "quick", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No silent promotion of dtypes or ranks, and no random key used twice.

    A module that leans on other people's sums opts out of the former by name.
    """
    relaxed = getattr(request.module, "STANDARD_PROMOTION", False)
    with (
        jax.numpy_dtype_promotion("standard" if relaxed else "strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_key_reuse(True),
    ):
        yield


@pytest.fixture(autouse=True, scope="module")
def own_caches():
    """Programs compiled for one module are of no use to the next, and take gigabytes in the end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quickly_compiled(tmp_path_factory):
    """For modules whose time is that of compiling: not optimized, and each program once."""
    from support.training_process import compiled_once

    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
