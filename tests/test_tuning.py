"""Choices by platform: of the platform lowered for, whatever the process's default is."""

import jax
import jax.numpy as jnp
import pytest

import qrhash
from qrhash import tuning
from qrhash.merge import merge_rows
from support.cases import assert_close

ROWS, VALUES = jnp.array([3, 1, 3, 9]), jnp.ones((4, 2))


def _merge(rows, values):
    return merge_rows(rows, values, 7)


def _text(fun, *args, platform):
    return jax.jit(fun).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "sorts"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_duplicates_are_merged_as_the_platform_lowered_for_wants(platform, sorts):
    assert ("stablehlo.sort" in _text(_merge, ROWS, VALUES, platform=platform)) == sorts


@pytest.mark.parametrize(("platform", "multiplies"), [("cpu", False), ("cuda", True)])
def test_gradients_of_small_tables_are_products_where_scatters_wait(platform, multiplies):
    gather = lambda table: qrhash.gather((table,), (ROWS,), fill_value=0)[0].sum()  # noqa: E731
    text = _text(jax.grad(gather), jnp.ones((4, 2)), platform=platform)
    assert ("stablehlo.dot_general" in text) == multiplies
    assert ("stablehlo.scatter" in text) != multiplies


def test_a_program_for_several_platforms_has_the_right_numbers_on_this_one():
    exported = jax.export.export(jax.jit(_merge), platforms=("cpu", "cuda"))(ROWS, VALUES)
    jax.tree.map(assert_close, exported.call(ROWS, VALUES), _merge(ROWS, VALUES))


def test_outside_of_jit_nothing_is_compiled_twice():
    grads = qrhash.RowGrads(ROWS, VALUES, 7)
    grads.merge()
    compiled = tuning._when_lowered._cache_size()
    for _ in range(3):
        grads.merge()
    assert tuning._when_lowered._cache_size() == compiled


def test_equal_choices_leave_no_trace():
    add = lambda choice, static, x: x + choice + static  # noqa: E731
    program = jax.make_jaxpr(lambda x: tuning.by_platform(lambda _: 1.0, add, (2.0,), x))(1.0)
    assert [equation.primitive.name for equation in program.eqns] == ["add", "add"]


def test_what_is_traced_for_is_where_the_work_is_to_be_done(monkeypatch):
    """As on a machine with a GPU, whose work goes there unless a device or a mesh is named."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert tuning.traced_for() == tuning.ACCELERATOR
    with jax.default_device(jax.devices()[1]):
        assert tuning.traced_for() == tuning.CPU
    seen = []
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        jax.make_jaxpr(lambda x: seen.append(tuning.traced_for()) or x)(1.0)
    assert seen == [tuning.CPU]
