"""Which embedding a column gets, and what `collisions` means."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

import qrhash
from qrhash import Keys
from qrhash.ctr.data.pipeline import Padded
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import embed_configs, tables_of
from qrhash.ctr.model.models import Embeddings
from qrhash.ctr.settings import Settings

FAMILIES = ("quotient-remainder", "mixed-radix", "chinese-remainder", "hash-trick")


def _config(size, name="C1", **options):
    return embed_configs(Settings(**options), {name: size})[name]


@pytest.mark.parametrize(
    ("family", "num_tables"),
    [*((family, 2) for family in FAMILIES), *itertools.product(FAMILIES[1:3], (3, 4))],
)
@pytest.mark.parametrize("collisions", [2, 4, 5, 60])
def test_collisions_divide_the_rows_in_every_family(family, num_tables, collisions):
    size = 100_003
    partition = _config(
        size, partition=family, num_tables=num_tables, collisions=collisions
    ).partition
    *small, large = sorted(partition.num_rows)
    assert 0 <= large - size / collisions < collisions
    assert sum(small) <= 2 * collisions
    assert partition.is_complementary == (family != "hash-trick")


@pytest.mark.parametrize("family", FAMILIES)
def test_frequent_ids_share_no_row_of_the_largest_table(family):
    partition = _config(1000, partition=family, collisions=4).partition
    largest = partition.num_rows.index(max(partition.num_rows))
    assert len(set(partition.indices(np.arange(250))[largest].tolist())) == 250


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("collisions", [0, 1001, 10_000, 2_000_000])
def test_no_more_collisions_than_give_the_least_memory(family, collisions):
    partition = _config(1_000_000, partition=family, num_tables=2, collisions=collisions).partition
    assert sum(partition.num_rows) < 2010


def test_a_section_about_the_embedding_overrides_the_threshold():
    assert _config(100, columns={"C1": {"min_count": 2}}).partition == qrhash.FullTable(100)
    config = _config(
        100, columns={"C1": {"collisions": 2, "operation": "concat", "widths": (12, 4)}}
    )
    assert config.table_shapes == ((2, 12), (50, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_tables": 3}, "num_tables goes with partition mixed-radix or chinese-remainder"),
        ({"columns": {"C1": {"radices": (9, 9)}}}, "radices goes with partition 'mixed-radix'"),
        ({"columns": {"C1": {"moduli": (9, 8)}}}, "moduli goes with partition 'chinese-remaind"),
        ({"seed": 2**31}, "seed must be at most 2147483647"),
        ({"hash_size": 2**31}, "hash_size must be at most 2147483647"),
    ],
)
def test_what_means_nothing_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Settings(**options)


def test_the_threshold_separates_long_from_short_columns():
    assert _config(200, threshold=200).partition == qrhash.FullTable(200)
    assert _config(201, threshold=200).partition == qrhash.QuotientRemainder(201, 51)
    assert embed_configs(Settings(partition="drop"), {"C1": 201, "C2": 9}).keys() == {"C2"}
    assert _config(201, partition="full").partition == qrhash.FullTable(201)


def test_a_column_that_would_not_shrink_stays_full():
    assert _config(5, threshold=0, collisions=4).partition == qrhash.FullTable(5)
    assert _config(300, collisions=1).partition == qrhash.FullTable(300)


def test_a_section_overrides_its_column_whatever_the_threshold():
    columns = {
        "C1": {"partition": "mixed-radix", "radices": (10, 11), "operation": "concat"},
        "C2": {"partition": "chinese-remainder", "moduli": (11, 13), "init_stddev": 0.5},
        "C3": {"partition": "drop"},
    }
    settings = Settings(columns=columns, features=6)
    configs = embed_configs(settings, dict.fromkeys(("C1", "C2", "C3", "C4"), 100))
    assert list(configs) == ["C1", "C2", "C4"]
    assert configs["C1"].partition == qrhash.MixedRadix(100, (10, 11))
    assert configs["C1"].operation == "concat"
    assert configs["C2"].partition == qrhash.ChineseRemainder(100, (11, 13))
    assert configs["C2"].operation == "mult"
    assert {config.features for config in configs.values()} == {6}


def test_a_product_starts_as_a_row_of_the_largest_table_up_to_signs():
    config = _config(1000, operation="mult", collisions=4, init_stddev=0.3)
    signs, rows = qrhash.init(jax.random.key(0), config)
    assert signs.shape == (4, 16)
    assert (abs(abs(signs) - 1) < 0.6).all()
    assert 10 < (signs > 0).sum() < 54
    assert np.std(rows) == pytest.approx(0.3, rel=0.05)


def test_a_single_table_is_not_combined():
    assert _config(100, operation="project").num_params == 100 * Settings().features


WRONG = {
    "moduli": {"partition": "chinese-remainder", "moduli": (10, 20)},
    "radices": {"partition": "mixed-radix", "radices": (2, 2)},
    "collisions": {"partition": "hash-trick", "collisions": 0},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_core_refuses_names_the_column(name):
    with pytest.raises(UserError, match=f"Column C5, 150 ids: .*{name}"):
        embed_configs(Settings(columns={"C5": WRONG[name]}), {"C5": 150})


# --- compression in bytes -------------------------------------------------------------------------

SIZES = {"C1": 50_000, "C2": 9_000, "C3": 150, "C4": 3_000}


def _bytes_of(configs):
    return sum(config.num_params * config.param_dtype.itemsize for config in configs.values())


@pytest.mark.parametrize("compression", [None, 4.0])
def test_the_id_of_all_that_was_never_met_has_zeros_where_nobody_trains_it(compression):
    def padding_ids(**options):
        configs = embed_configs(Settings(compression=compression, **options), SIZES)
        return {config.padding_id for config in configs.values()}

    assert padding_ids() == padding_ids(partition="full") == {0}
    assert padding_ids(min_count=2) == padding_ids(hash_size=9_000) == {None}
    assert padding_ids(columns={"C1": {"min_count": 3}}) == {0, None}
    of_keys = embed_configs(Settings(ids="keys"), dict.fromkeys(SIZES))
    assert {config.padding_id for config in of_keys.values()} == {None}


def test_of_as_many_bytes_path_is_the_default_and_mult_elsewhere():
    def operation(**options):
        return embed_configs(Settings(**options), SIZES)["C1"].operation

    assert operation(compression=4.0) == "path"
    assert operation(columns={"C1": {"compression": 4.0}}) == "path"
    assert operation(compression=4.0, operation="add") == "add"
    assert operation() == operation(collisions=8) == operation(ids="keys") == "mult"
    assert operation(compression=4.0, partition="mixed-radix", num_tables=3) == "mult"
    assert operation(compression=4.0, partition="hash-trick") == "mult"
    widths = {"C1": {"compression": 4.0, "widths": [16, 16]}}
    assert operation(columns=widths) == "mult"


@pytest.mark.parametrize("compression", [2.0, 4.0, 15.0])
@pytest.mark.parametrize("operation", ["mult", "concat", "project", "add", "path"])
@pytest.mark.parametrize("family", ["quotient-remainder", "mixed-radix", "chinese-remainder"])
def test_compression_is_that_of_all_bytes_whatever_the_operation(family, operation, compression):
    settings = Settings(compression=compression, operation=operation, partition=family)
    configs = embed_configs(settings, SIZES)
    full = 4 * settings.features * sum(SIZES.values())
    assert configs["C3"].partition == qrhash.FullTable(150)  # no longer than the threshold
    assert compression <= full / _bytes_of(configs) < 1.04 * compression


def test_compression_counts_narrow_types_and_the_columns_of_their_own():
    columns = {"C4": {"compression": 10.0}, "C1": {"param_dtype": "bfloat16"}}
    configs = embed_configs(Settings(compression=4.0, columns=columns), SIZES)
    full = {name: 64 * size for name, size in SIZES.items()}
    assert 10 <= full["C4"] / _bytes_of({"": configs["C4"]}) < 10.1
    assert 4.0 <= sum(full.values()) / _bytes_of(configs) < 4.1


def test_the_hash_trick_and_full_tables_under_a_compression():
    trick = embed_configs(Settings(compression=4.0, partition="hash-trick"), SIZES)
    assert 4.0 <= 64 * sum(SIZES.values()) / _bytes_of(trick) < 4.1
    full = embed_configs(Settings(compression=4.0, partition="full"), SIZES)
    assert _bytes_of(full) == 64 * sum(SIZES.values())
    columns = {"C1": {"partition": "quotient-remainder"}}
    one = embed_configs(Settings(compression=2.0, partition="full", columns=columns), SIZES)
    assert one["C2"].partition == qrhash.FullTable(9_000)
    assert 2.0 <= 64 * sum(SIZES.values()) / _bytes_of(one) < 2.1


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 50_000}, {"columns": {n: {"collisions": 2} for n in SIZES}}]
)
def test_what_cannot_be_compressed_so_far_is_said(options):
    with pytest.raises(UserError, match=r"compression=1000.*smallest ones take.*threshold below"):
        embed_configs(Settings(compression=1000.0, **options), SIZES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": 4.0, "collisions": 4}, "compression .*collisions .*one of them"),
        ({"compression": 0.5}, "compression must be at least 1"),
        ({"columns": {"C1": {"compression": 4.0, "collisions": 2}}}, "one of them"),
        (
            {"columns": {"C1": {"compression": 4.0, "partition": "full"}}},
            "columns.C1: compression .*no meaning beside partition 'full'",
        ),
    ],
)
def test_amounts_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Settings(**options)


def test_a_column_says_its_amount_in_its_own_way():
    settings = Settings(compression=4.0, columns={"C1": {"collisions": 10}})
    assert embed_configs(settings, SIZES)["C1"].partition == qrhash.QuotientRemainder(50_000, 5000)


# --- keys -----------------------------------------------------------------------------------------


def test_columns_of_keys_have_tables_of_their_digits():
    columns = {
        "C2": {"key_bits": 64, "num_tables": 4, "operation": "concat"},
        "C3": {"ids": "vocabulary"},
        "C4": {"hash_size": 500},
        "C5": {"partition": "drop"},
    }
    settings = Settings(ids="keys", key_bits=20, columns=columns, large_table_rows=1000)
    sizes = {"C1": None, "C2": None, "C3": 100, "C4": 500, "C5": None}
    configs = embed_configs(settings, sizes)
    assert list(configs) == ["C1", "C2", "C3", "C4"]
    assert replace(configs["C1"].partition, seed=0) == qrhash.KeyDigits(20, 2)
    assert configs["C1"].large_tables == (True, True)
    assert configs["C2"].partition == qrhash.KeyDigits(64, 4)
    assert configs["C2"].table_shapes == ((65536, 4),) * 4
    assert configs["C3"].partition == qrhash.FullTable(100)
    assert configs["C4"].partition == qrhash.QuotientRemainder(500, 125)


def test_columns_of_keys_share_their_tables():
    """Each with hashes of its own; those with a section about tables have theirs."""
    columns = {"C2": {"key_bits": 12}, "C4": {"ids": "vocabulary"}, "tags": {"combiner": "max"}}
    settings = Settings(data="events", ids="keys", key_bits=20, columns=columns)
    configs = embed_configs(settings, {"C1": None, "C2": None, "C3": None, "C4": 9, "tags": None})
    shared = [configs[name] for name in ("C1", "C3", "tags")]
    assert len({config.partition.seed for config in shared}) == 3
    assert [config.combiner for config in shared] == ["mean", "mean", "max"]
    assert tables_of(configs) == [configs[name] for name in ("C1", "C2", "C4")]
    model = Embeddings(configs, lists=["tags"], rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == 2 * 1024 * 16 + 2 * 64 * 16 + 9 * 16
    keys = Keys.of(np.full((2, 3), 7, np.uint64))
    lists = Padded(Keys.of(np.full((2, 2), 7, np.uint64)), np.array([[1, 0], [1, 1]], bool))
    c1, c2, c3, _, tags = model(np.zeros((2, 1), np.int32), keys, [lists])
    # The same key, of another column another vector; of a list of it twice the same maximum.
    for one, other in itertools.combinations((c1, c2, c3, tags), 2):
        assert not np.allclose(one, other)
    np.testing.assert_array_equal(tags[0], tags[1])


def test_towers_have_a_pool_each():
    options = {
        "data": "events",
        "ids": "keys",
        "model": "two-tower",
        "items": "b,c",
        "key_bits": 10,
    }
    configs = embed_configs(Settings(**options), dict.fromkeys("abcd"))
    assert tables_of(configs) == [configs["a"], configs["b"]]


def test_a_section_says_its_own_way_from_keys_to_rows():
    settings = Settings(hash_size=9, columns={"C1": {"ids": "keys"}, "C2": {"ids": "vocabulary"}})
    assert settings.column("C1").takes_keys
    assert (settings.column("C2").hash_size, settings.column("C3").hash_size) == (None, 9)
    settings = Settings(ids="keys", partition="full", columns={"C1": {"hash_size": 9}})
    assert not settings.column("C1").takes_keys


def test_keys_are_no_part_of_a_compression():
    settings = Settings(compression=4.0, columns={"C1": {"ids": "keys", "key_bits": 10}})
    configs = embed_configs(settings, SIZES | {"C1": None})
    assert configs["C1"].table_shapes == ((32, 16), (32, 16))
    full = 64 * sum(size for name, size in SIZES.items() if name != "C1")
    others = {name: config for name, config in configs.items() if name != "C1"}
    assert 4.0 <= full / _bytes_of(others) < 4.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ids": "keys", "compression": 4.0}, "compression goes with a vocabulary"),
        ({"columns": {"C1": {"ids": "keys", "min_count": 2}}}, "C1: min_count goes with ids from"),
        ({"ids": "keys", "columns": {"C1": {"collisions": 2}}}, "C1: collisions goes with ids"),
        ({"columns": {"C1": {"ids": "keys", "partition": "full"}}}, "C1: partition goes with ids"),
        ({"ids": "keys", "partition": "full"}, "partition 'full' goes with ids from a vocabulary"),
        ({"ids": "keys", "hash_size": 9}, "ids 'keys' and hash_size are two ways"),
        ({"key_bits": 65}, "key_bits must be at most 64"),
    ],
)
def test_options_that_keys_have_no_use_for_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Settings(**options)


def test_tables_of_keys_that_cannot_be_name_the_column():
    settings = Settings(ids="keys", key_bits=64)
    with pytest.raises(UserError, match=r"Column C7, keys of 64 bits: num_tables must be from 3"):
        embed_configs(settings, {"C7": None})
