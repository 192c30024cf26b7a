"""The shared table of cases: family x operation, and dtypes, each over every rank of ids."""

import itertools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qrhash

FEATURES = 8  # three tables: concat takes 3 + 3 + 2, project and path rows of 2

FAMILIES = {
    "full": qrhash.FullTable(10),
    "hash": qrhash.HashTrick(10, 4),
    "quotient-remainder": qrhash.QuotientRemainder(11, 4),
    "mixed radix": qrhash.MixedRadix(29, (2, 5, 3)),
    "chinese remainder": qrhash.ChineseRemainder(29, (2, 5, 3)),
    "deeprec": qrhash.deeprec.DeepRecQuotientRemainder(9, 3, 4),
}
OPERATIONS = ("add", "mult", "concat", "project", "path")  # "features" has another shape
# Where rows are added up, or carried from one module to another, "path" is as "mult".
OF_EACH_KIND = OPERATIONS[:-1]
DTYPES = {  # (param_dtype, dtype)
    "f32": (jnp.float32, None),
    "bf16": (jnp.bfloat16, None),
    "bf16 tables, f32 maths": (jnp.bfloat16, jnp.float32),
    "f32 tables, bf16 maths": (jnp.float32, jnp.bfloat16),
}
SHAPES = ((), (0,), (7,), (2, 3), (2, 1, 3))
POLICIES = ("raise", "nan", "zero", "clip", "wrap")

# With these, what is compiled to be read has the HLO that users get: see conftest.py. LLVM's own
# optimizations come after it.
OPTIMIZED = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None


class Case(NamedTuple):
    family: str
    operation: str
    dtypes: str

    @property
    def config(self):
        param_dtype, dtype = DTYPES[self.dtypes]
        return config(self.family, self.operation, dtype=dtype, param_dtype=param_dtype)

    @property
    def tolerances(self):
        """Of the vectors, in the dtype of the maths, and of gradients, also in the tables'."""
        dtypes = [dtype or DTYPES[self.dtypes][0] for dtype in reversed(DTYPES[self.dtypes])]
        exact = [dtype == jnp.float32 for dtype in dtypes]
        return (1e-5 if exact[0] else 2**-5), (1e-5 if all(exact) else 2**-5)

    def __str__(self):
        return "-".join(self)


def covering(*choices, strength=2, where=lambda *_: True):
    """A few of all combinations of choices, in which any two of them, or more, meet at least once.

    A covering array: a mistake that needs no more than `strength` choices together is found.
    """
    rows = [row for row in itertools.product(*choices) if where(*row)]
    places = list(itertools.combinations(range(len(choices)), strength))
    met = {row: {(at, *(row[i] for i in at)) for at in places} for row in rows}
    left, chosen = set().union(*met.values()), []
    while left:
        chosen.append(max(rows, key=lambda row: len(met[row] & left)))
        left -= met[chosen[-1]]
    return chosen


# What comes after the indices knows no family but by its number of tables: from one to three there.
OF_EVERY_DTYPE = ("full", "quotient-remainder", "mixed radix")
CASES = [Case(*pair, "f32") for pair in itertools.product(FAMILIES, OPERATIONS)]
CASES += itertools.starmap(Case, covering(OF_EVERY_DTYPE, OPERATIONS, list(DTYPES)[1:]))


def config(family, operation, **options):
    return qrhash.EmbedConfig(FAMILIES[family], FEATURES, operation, **options)


def parameters(cfg, rng):
    """Tables (and projection) with entries of order one, so that errors show everywhere."""
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), cfg.param_dtype)  # noqa: E731
    tables = tuple(draw(shape) for shape in cfg.table_shapes)
    if cfg.projection_shape is None:
        return tables, None
    return tables, qrhash.Projection(draw(cfg.projection_shape), draw((cfg.features,)))


def ids_of_every_shape(cfg, rng):
    n = cfg.partition.num_embeddings
    return [np.asarray(rng.integers(0, n, shape), np.int32) for shape in SHAPES]


def assert_close(got, want, tolerance=1e-5):
    """Equal to a part in 1/tolerance of the largest entry; NaN equals NaN."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    scale = max(1.0, np.nanmax(np.abs(want), initial=0.0))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


def merging_by(method):
    """Rows named several times are summed by "hash" or by "sort", whatever the platform."""
    return mock.patch.object(qrhash.tuning, "merge_method", return_value=method)


def nnx_step(loss_of, traces, check=lambda grads: None):
    """A step of the training of an NNX model whose embedding is `embed`, jitted.

    (model, optimizer, keys, targets, number) -> loss, by `loss_of(output, targets)`. What is traced
    is told by `traces`, a list; `check` is given the gradients there.
    """

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, keys, targets, number):
        traces.append(number)
        found = model.embed.assign(keys, number)
        optimizer.reset_rows(model, model.embed, found)
        loss_fn = lambda model: loss_of(model(found), targets)  # noqa: E731
        loss, grads = qrhash.nnx.value_and_grad(loss_fn)(model)
        check(grads)
        optimizer.update(model, grads)
        return loss

    return step


def linen_step(model, assign, tx, loss_of, found):
    """The same of a linen model, by the optimizer `tx`; to be jitted.

    (params, state, opt_state, keys, targets, number) -> params, state, opt_state, loss. `assign` is
    `dynamic.assign` or `assign_all`, `found` what one of them gives.
    """
    made = jax.eval_shape(model.init, jax.random.key(0), found)["params"]
    large = qrhash.linen.large_tables(made)

    def step(params, state, opt_state, keys, targets, number):
        state, found = assign(state, keys, model.config, number)
        params, new = qrhash.linen.start_rows(params, {"embed": found}, model.config)
        opt_state = qrhash.reset_rows(tx, opt_state, params, new)
        loss_fn = lambda params: loss_of(model.apply({"params": params}, found), targets)  # noqa: E731
        loss, grads = qrhash.value_and_grad(loss_fn, large)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return qrhash.apply_updates(params, updates), state, opt_state, loss

    return step
