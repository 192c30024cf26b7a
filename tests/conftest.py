"""Eight host devices and strict settings, set before jax is imported."""

import collections
import importlib.metadata
import math
import os
import zlib

# The time of most tests is that of compiling what runs once, often one operation at a time: a third
# of it goes without LLVM's optimizations. What is compiled to be read takes `cases.OPTIMIZED`.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Another jaxlib may not know these.
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
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


# Every case of their tests compiles programs of its own, or trains. Of each test a third of its
# cases runs in every CI, and all of them before a release: the others are slow. Which ones goes by
# their ids, so that tests of the same cases need the same fixtures.
COSTLY = {
    *(
        "autodiff",
        "checkpoint",
        "collection",
        "ctr_best",
        "ctr_devices",
        "ctr_dynamic",
        "ctr_export",
    ),
    *("ctr_list_runs", "ctr_models", "ctr_resume", "ctr_towers", "ctr_train", "deeprec"),
    *("deeprec_dynamic", "dropin", "dynamic", "dynamic_collection", "dynamic_deltas"),
    *("dynamic_growth", "dynamic_meshes", "dynamic_modules", "export", "fitting", "linen", "nnx"),
    *("optim", "pooling", "rowgrads", "sharding", "tables", "take", "training"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    cases = collections.defaultdict(list)
    for item in items:
        is_costly = item.path.stem.removeprefix("test_") in COSTLY
        if is_costly and hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            cases[item.path, item.originalname].append(item)
    for each in cases.values():
        each.sort(key=lambda item: zlib.crc32(item.callspec.id.encode()))
        for item in each[math.ceil(len(each) / 3) :]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No silent promotion of dtypes or ranks, and no random key used twice.

    A module that leans on other people's sums opts out of the former by name. Of the latter, which
    keeps every call from JAX's fast path, one whose tests draw no more than a start that others
    watch; those that draw more there take `keys_used_once`.
    """
    relaxed = getattr(request.module, "STANDARD_PROMOTION", False)
    with (
        jax.numpy_dtype_promotion("standard" if relaxed else "strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_key_reuse(not getattr(request.module, "UNCHECKED_KEYS", False)),
    ):
        yield


@pytest.fixture
def keys_used_once(strict_promotion):
    """No random key used twice, in a module that is not checked for it otherwise."""
    with jax.debug_key_reuse(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def own_caches():
    """Programs compiled for one module are of no use to the next, and take gigabytes in the end."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def each_program_once(tmp_path_factory):
    """What one module compiles, the others take over, and processes of the tests as well."""
    from support.training_process import compiled_once

    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
