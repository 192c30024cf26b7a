"""Bags, however they are given: the same ids in the same bags; and what cannot be one, in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.sparse import BCOO, BCSR

from qrhash import Bag, Keys, MeshLayout, batches
from support.meshes import make_layout

UNCHECKED_KEYS = True

LISTS = [[], [7, 8], [3], [], [7], []]
WEIGHTS = [[], [0.5, 2.0], [1.0], [], [-1.0], []]
FLAT = [7, 8, 3, 7]
lists_of_ids = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=8)


def _as_lists(bag, of=None):
    """The ids of each bag, or what is given beside them."""
    of = bag.ids if of is None else of
    values = (of.to_numpy() if isinstance(of, Keys) else np.asarray(of)).tolist()
    lists = [[] for _ in range(bag.num_bags)]
    for value, segment in zip(values, np.asarray(bag.segments).tolist(), strict=True):
        if 0 <= segment < bag.num_bags:
            lists[segment].append(value)
    return lists


def _padded(lists, length, fill):
    return np.array([each + [fill] * (length - len(each)) for each in lists])


PADDED = _padded(LISTS, 3, -1)
MATRIX = scipy.sparse.csr_array(
    (np.float32([0.5, 2, 1, -1]), FLAT, [0, 0, 2, 3, 3, 4, 4]), shape=(6, 10)
)
GIVEN = {
    "lists": lambda: Bag.from_lists(LISTS),
    "None for an empty list": lambda: Bag.from_lists([each or None for each in LISTS]),
    "arrays": lambda: Bag.from_lists([np.array(each, np.int32) for each in LISTS]),
    "pandas": lambda: Bag.from_lists(pd.Series(LISTS)),
    "an Arrow array": lambda: Bag.from_lists(pa.array(LISTS)),
    "an Arrow array with nulls": lambda: Bag.from_lists(pa.array([x or None for x in LISTS])),
    "a slice of an Arrow array": lambda: Bag.from_lists(pa.array([[1, 2], *LISTS, [3]])[1:7]),
    "an Arrow column of chunks": lambda: Bag.from_lists(pa.chunked_array([LISTS[:2], LISTS[2:]])),
    "large Arrow lists": lambda: Bag.from_lists(pa.array(LISTS, pa.large_list(pa.int32()))),
    "lengths": lambda: Bag.from_ragged(FLAT, lengths=[0, 2, 1, 0, 1, 0]),
    "offsets": lambda: Bag.from_ragged(np.uint8(FLAT), offsets=[0, 0, 2, 3, 3, 4, 4]),
    "spare places": lambda: Bag.from_ragged(FLAT, lengths=[0, 2, 1, 0, 1, 0], capacity=9),
    "a padding id": lambda: Bag.from_padded(PADDED, padding_id=-1),
    "a mask": lambda: Bag.from_padded(PADDED, mask=PADDED >= 0),
    "padded with lengths": lambda: Bag.from_padded(PADDED, lengths=np.array([0, 2, 1, 0, 1, 0])),
    "arrays of the device": lambda: Bag.from_padded(jnp.asarray(PADDED), padding_id=-1),
    "inside of jit": lambda: jax.jit(lambda ids: Bag.from_padded(ids, padding_id=-1))(PADDED),
    "a sparse matrix": lambda: Bag.from_sparse(MATRIX),
    "one of coordinates": lambda: Bag.from_sparse(MATRIX.tocoo()),
    "JAX's": lambda: Bag.from_sparse(BCOO.from_scipy_sparse(MATRIX)),
    "JAX's by rows": lambda: Bag.from_sparse(BCSR.from_scipy_sparse(MATRIX)),
}


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
def test_the_same_ids_in_the_same_bags_however_they_are_given(make):
    bag = make()
    assert _as_lists(bag) == LISTS
    assert bag.shape == (6,)
    assert bag.num_bags == 6
    assert bag.counts().tolist() == [0, 2, 1, 0, 1, 0]
    assert np.asarray(bag.segments).dtype == np.int32


WEIGHTED = {
    "lists": lambda: Bag.from_lists(LISTS, weights=WEIGHTS),
    "Arrow": lambda: Bag.from_lists(pa.array(LISTS), weights=pa.array(WEIGHTS)),
    "lengths": lambda: Bag.from_ragged(FLAT, lengths=[0, 2, 1, 0, 1, 0], weights=[0.5, 2, 1, -1]),
    "spare places": lambda: Bag.from_lists(LISTS, weights=WEIGHTS, capacity=7),
    "padded": lambda: Bag.from_padded(PADDED, padding_id=-1, weights=_padded(WEIGHTS, 3, 9.0)),
    "a sparse matrix": lambda: Bag.from_sparse(MATRIX),
    "a sparse matrix with spare places": lambda: Bag.from_sparse(MATRIX, capacity=11),
    "JAX's": lambda: Bag.from_sparse(BCOO.from_scipy_sparse(MATRIX)),
    "later": lambda: Bag.from_lists(LISTS).with_weights(jnp.array([0.5, 2, 1, -1])),
}


@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED)
def test_weights_go_with_their_ids(make):
    bag = make()
    assert _as_lists(bag) == LISTS
    assert _as_lists(bag, bag.weights) == WEIGHTS


@given(lists_of_ids, st.integers(0, 3))
def test_nothing_is_lost_or_doubled(lists, spare):
    n = sum(map(len, lists))
    assert _as_lists(Bag.from_lists(lists, capacity=n + spare)) == lists
    length = max(map(len, lists), default=0) + spare
    padded = np.array(_padded(lists, length, 100), np.int64).reshape(len(lists), length)
    assert _as_lists(Bag.from_padded(padded, padding_id=100)) == lists
    assert _as_lists(Bag.from_padded(padded, lengths=[len(each) for each in lists])) == lists


TEXT = [["news", "sport"], [], ["sport"]]


@pytest.mark.parametrize("lists", [TEXT, pa.array(TEXT), pd.Series(TEXT)], ids=["lists", "a", "p"])
def test_text_becomes_keys(lists):
    news, sport = Keys.of(["news", "sport"]).to_numpy().tolist()
    bag = Bag.from_lists(lists, capacity=5)
    assert isinstance(bag.ids, Keys)
    assert _as_lists(bag) == [[news, sport], [], [sport]]


def test_wide_integers_stay_exact():
    wide = [[2**40, -1], [2**63 - 1]]
    assert _as_lists(Bag.from_lists(wide)) == wide
    keys = Keys.of(np.array([[2**63, 5], [6, 7]], np.uint64))
    assert _as_lists(Bag.from_padded(keys, mask=np.array([[True, False], [True, True]]))) == [
        [2**63],
        [6, 7],
    ]
    assert _as_lists(Bag.from_padded(keys, padding_id=5)) == [[2**63], [6, 7]]


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4), (0, 3), (3, 0), (5,)])
def test_padded_bags_of_any_shape(shape, rng):
    ids = rng.integers(0, 9, shape)
    bag = Bag.from_padded(ids)
    assert bag.shape == shape[:-1]
    assert _as_lists(bag) == ids.reshape(bag.num_bags, shape[-1]).tolist()


def test_a_bag_is_a_pytree_whose_shape_is_static():
    bag = Bag.from_lists(LISTS)
    count = 0

    @jax.jit
    def same(bag):
        nonlocal count
        count += 1
        return bag

    for lists in (LISTS, LISTS[::-1]):
        assert _as_lists(same(Bag.from_lists(lists))) == lists
    assert count == 1
    assert jax.tree.leaves(bag)[0] is bag.ids


REFUSED = {
    "more ids than places": (lambda: Bag.from_lists(LISTS, capacity=3), "capacity .* 4, got 3"),
    "no integer of places": (lambda: Bag.from_lists(LISTS, capacity=4.5), "capacity"),
    "neither offsets nor lengths": (lambda: Bag.from_ragged([1]), "either offsets or lengths"),
    "both": (lambda: Bag.from_ragged([1], lengths=[1], offsets=[0, 1]), "either"),
    "offsets that do not begin": (lambda: Bag.from_ragged([1], offsets=[1, 1]), "begin with 0"),
    "offsets that do not end": (lambda: Bag.from_ragged([1, 2], offsets=[0, 1]), "values, 2, got"),
    "torch's offsets without the end": (
        lambda: Bag.from_ragged([1, 2, 3], offsets=[0, 2]),
        "one more than there are bags",
    ),
    "no offsets": (lambda: Bag.from_ragged([], offsets=[]), "offsets must begin"),
    "offsets that fall": (lambda: Bag.from_ragged([1, 2], offsets=[0, 2, 1, 2]), "not fall"),
    "lengths below 0": (lambda: Bag.from_ragged([1], lengths=[2, -1]), "below 0"),
    "too short lengths": (lambda: Bag.from_ragged([1, 2], lengths=[1]), "add up to .* 2, got 1"),
    "lengths of two axes": (lambda: Bag.from_ragged([1], lengths=[[1]]), "one axis"),
    "values of two axes": (lambda: Bag.from_ragged([[1]], lengths=[1]), "one axis"),
    "values that are no ids": (lambda: Bag.from_ragged([1.5], lengths=[1]), "integer"),
    "other weights": (lambda: Bag.from_ragged([1], lengths=[1], weights=[1, 2]), "weights .*shape"),
    "weights of other lists": (lambda: Bag.from_lists([[1], [2]], weights=[[1, 1], []]), "weights"),
    "no lists": (lambda: Bag.from_lists([1, 2]), "must hold lists, got 1"),
    "text for a list": (lambda: Bag.from_lists(["ab"]), "must hold lists, got 'ab'"),
    "a column of no lists": (lambda: Bag.from_lists(pa.array([1])), "column of lists"),
    "a null in a list": (lambda: Bag.from_lists(pa.array([[1, None]])), "missing"),
    "None in a list": (lambda: Bag.from_lists([["a", None]]), "None"),
    "mask and lengths": (
        lambda: Bag.from_padded(PADDED, mask=PADDED > 0, lengths=[1]),
        "one of mask",
    ),
    "a mask of another shape": (
        lambda: Bag.from_padded(PADDED, mask=PADDED[0] > 0),
        "mask .*shape",
    ),
    "a mask of numbers": (lambda: Bag.from_padded(PADDED, mask=PADDED), "mask must be bool"),
    "longer than the places": (lambda: Bag.from_padded([[1]], lengths=[2]), "lengths .* 1, got 2"),
    "shorter than nothing": (lambda: Bag.from_padded([[1]], lengths=[-1]), "lengths .* got -1"),
    "no axis": (lambda: Bag.from_padded(1), "shape"),
    "no sparse matrix": (lambda: Bag.from_sparse(PADDED), "sparse .* got ndarray"),
    "three axes": (
        lambda: Bag.from_sparse(BCOO.fromdense(jnp.ones((2, 2, 2)))),
        "two axes",
    ),
    "weights of another length": (
        lambda: Bag.from_lists(LISTS).with_weights(jnp.ones(3)),
        "weights .*shape",
    ),
    "weights that are no numbers": (
        lambda: Bag.from_ragged([1], lengths=[1], weights=["a"]),
        "weights must be numbers",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_bag_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_of_bags_for_a_mesh_is_made_of_padded_arrays():
    layout: MeshLayout = make_layout((4,), ("data",))
    with pytest.raises(ValueError, match="from_padded inside"):
        batches.put_batch({"a": Bag.from_lists(LISTS)}, 4, layout)
    ids = batches.put_batch(_padded([[1], [], [2, 3], [4]], 2, -1), 4, layout)
    assert _as_lists(jax.jit(lambda ids: Bag.from_padded(ids, padding_id=-1))(ids)) == [
        [1],
        [],
        [2, 3],
        [4],
    ]


def test_a_bag_does_not_keep_the_buffer_that_it_was_made_of():
    ids = np.arange(6)
    bag = Bag.from_ragged(ids, lengths=[2, 4])
    ids[:] = 0
    assert np.asarray(bag.ids).tolist() == [0, 1, 2, 3, 4, 5]
