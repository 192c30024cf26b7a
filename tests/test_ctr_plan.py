"""`qrhash plan`: from data or sizes to a file by which the trainer builds what was planned."""

import csv
import dataclasses
import json
import re
import tomllib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import qrhash
from qrhash import cli, dynamic
from qrhash.budget import partition_of
from qrhash.ctr.config_file import load
from qrhash.ctr.data.counts import KeyCounts
from qrhash.ctr.data.sizes import read_sizes
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import embed_configs
from qrhash.ctr.model.models import build_model
from qrhash.ctr.model.planned import planned, section_of
from qrhash.ctr.options import bytes_of
from qrhash.ctr.run import plan as planning_run
from qrhash.ctr.run.devices import make_layout
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.settings import Settings
from qrhash.planning import BudgetError, Column

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

# As some of Criteo's columns, a thousandth as long.
SIZES = {"C1": 20, "C3": 10131, "C4": 2203, "C9": 3, "C10": 931, "C24": 286, "C26": 143}


def _run(*arguments):
    arguments = ["plan", *map(str, arguments)]
    return CliRunner().invoke(cli.build_app(), arguments, env={"COLUMNS": "200"})


def _columns(sizes):
    return {name: Column(size) for name, size in sizes.items()}


# --- what the trainer builds ----------------------------------------------------------------------


def _sizes(plan):
    """As the trainer has them: of a column of keys there are none."""
    return {n: None if each.is_dynamic else each.num_embeddings for n, each in plan.columns}


def _planned_of(config):
    """What of a config a plan says: not its seeds, nor which id has a vector of zeros."""
    if not isinstance(config, dynamic.DynamicConfig):
        return dataclasses.replace(config, padding_id=None)
    partition = dataclasses.replace(config.refused.partition, seed=0)
    refused = dataclasses.replace(config.refused, partition=partition)
    return dataclasses.replace(config, seed=0, refused=refused)


def _same(built, planned):
    return {n: _planned_of(each) for n, each in built.items()} == {
        n: _planned_of(each) for n, each in planned.items()
    }


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("budget", [60_000, 640_000, 4_000_000])
@pytest.mark.parametrize("grows", ["no", "may", "must"])
def test_the_trainer_builds_what_was_planned(budget, devices, grows):
    settings = Settings(large_table_rows=400, init_stddev=0.3)
    columns = {name: Column(size, dynamic=grows, admit_after=3) for name, size in SIZES.items()}
    plan, sections = planned(
        settings, columns, budget, devices=devices, optimizer="adagrad", num_examples=None
    )
    text = planning_run.config_text(settings, sections, plan)
    again = Settings(**tomllib.loads(text))
    assert _same(embed_configs(again, _sizes(plan)), plan.configs)
    assert all(each.is_dynamic for _, each in plan.columns) == (grows == "must")
    assert any(each.is_dynamic for _, each in plan.columns) <= (grows != "no")
    assert again.mesh == (None if devices == 1 else "data=8")
    assert plan.bytes_per_device <= budget


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 50_000), min_size=1, max_size=4),
    st.sampled_from([1, 2, 7, 16]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 100, 16384]),
    st.floats(0.02, 1.1),
    st.sampled_from(["no", "may", "must"]),
    st.sampled_from([1, 2, 9]),
)
def test_whatever_is_planned_is_built(
    sizes, features, devices, large_table_rows, share, grows, admit_after
):
    sizes = {f"C{number}": size for number, size in enumerate(sizes, 1)}
    options = Settings(features=features, large_table_rows=large_table_rows, threshold=10)
    budget = max(1, int(share * sum(sizes.values()) * features * 8))
    try:
        plan, sections = planned(
            options,
            {n: Column(size, None, 1.0, None, grows, admit_after) for n, size in sizes.items()},
            budget,
            devices=devices,
            optimizer="adagrad",
            num_examples=None,
        )
    except BudgetError:
        return
    again = Settings(**tomllib.loads(planning_run.config_text(options, sections, plan)))
    assert _same(embed_configs(again, _sizes(plan)), plan.configs)
    assert plan.bytes_per_device <= budget


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("grows", "admit_after"), [("no", 2), ("must", 2)])
def test_a_device_holds_what_was_promised(devices, grows, admit_after):
    settings = Settings(
        large_table_rows=400,
        bottom_mlp="8",
        top_mlp="8",
        mesh=None if devices == 1 else f"data={devices}",
    )
    columns = _columns(SIZES)
    for name in ("C1", "C3", "C10", "C26"):
        columns[name] = Column(SIZES[name], dynamic=grows, admit_after=admit_after)
    budget = 80_000 if grows == "no" else 200_000
    plan, sections = planned(
        settings, columns, budget, devices=devices, optimizer="adagrad", num_examples=None
    )
    as_planned = dataclasses.replace(settings, columns=sections)
    layout = make_layout(as_planned)
    configs = embed_configs(as_planned, _sizes(plan), layout)
    operations = {getattr(config, "operation", "") for config in configs.values()}
    assert operations == ({"mult", "project"} if grows == "no" else {"mult", ""})
    learner = Learner(
        lambda: build_model(as_planned, configs, 13, ()), as_planned, num_steps=1, layout=layout
    )
    states = learner._state.inner_states
    adam = states["dense"].inner_state[0]
    dense = (learner.params["dense"], adam.mu["dense"], adam.nu["dense"])
    projections = [each["embeddings"] for each in dense if "embeddings" in each]
    held = dict.fromkeys(range(devices), 0)
    of_tables = [learner.params["tables"], states["tables"], learner._keys]
    for array in jax.tree.leaves([*of_tables, projections]):
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    # Not within a percent: to the byte.
    assert set(held.values()) == {plan.bytes_per_device}


@pytest.mark.parametrize(
    ("config", "section"),
    [
        (qrhash.EmbedConfig(qrhash.FullTable(1000), 16), {"partition": "full"}),
        (
            qrhash.EmbedConfig.fit(1000, 16, "project", num_params=3 * 1016 + 16),
            {"partition": "quotient-remainder", "operation": "project"},
        ),
        (
            qrhash.EmbedConfig(qrhash.HashTrick(1000, 77), 16),
            {"partition": "hash-trick"},
        ),
        (
            qrhash.EmbedConfig.fit(1000, 16, "concat", num_params=4000),
            {"partition": "quotient-remainder", "operation": "concat"},
        ),
        (
            qrhash.EmbedConfig.fit(
                1000,
                16,
                num_params=1700,
                family=lambda n, rows: partition_of("mixed-radix", n, rows, 3),
            ),
            {"partition": "mixed-radix", "operation": "mult", "num_tables": 3},
        ),
    ],
)
def test_a_section_says_the_embedding(config, section):
    found = section_of(config)
    found.pop("compression", None)
    assert found == section
    settings = Settings(columns={"C1": section_of(config)})
    built = embed_configs(settings, {"C1": 1000})["C1"]
    assert (built.partition, built.table_shapes) == (config.partition, config.table_shapes)


def test_what_the_settings_say_of_columns_stays(tmp_path):
    columns = {
        "C1": {"min_count": 3, "collisions": 7, "operation": "add"},
        "C2": {"init_stddev": 0.4, "partition": "mixed-radix", "radices": (5, 5)},
        "C3": {"partition": "drop"},
    }
    settings = Settings(columns=columns, compression=4, batch_size=32, top_mlp="16")
    sizes = {"C1": 500, "C2": 20, "C4": 3000}
    plan, sections = planned(
        settings, _columns(sizes), 80_000, devices=1, optimizer="adagrad", num_examples=None
    )
    text = planning_run.config_text(settings, sections, plan)
    as_planned = Settings(**tomllib.loads(text))
    assert (as_planned.compression, as_planned.columns) == (None, sections)
    assert (as_planned.batch_size, as_planned.top_mlp) == (32, "16")
    assert sections["C1"]["min_count"] == 3
    assert "collisions" not in sections["C1"]
    assert sections["C2"].keys() >= {"init_stddev", "partition"}
    assert "radices" not in sections["C2"]
    assert sections["C3"] == {"partition": "drop"}


def test_a_column_beside_tables_that_grow_is_planned():
    settings = Settings(dynamic="1000", columns={"C1": {"dynamic": "none"}})
    plan, sections = planned(
        settings, _columns({"C1": 500}), 20_000, devices=1, optimizer="adagrad", num_examples=None
    )
    again = Settings(**tomllib.loads(planning_run.config_text(settings, sections, plan)))
    built = embed_configs(again, {"C1": 500, "C2": None})
    assert _planned_of(built["C1"]) == plan.configs["C1"]
    assert built["C2"].capacity == 1000


# --- from data ------------------------------------------------------------------------------------


def _write_table(path, rows=400):
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "user_id", "item", "tags", "age"])
        for _ in range(rows):
            user, item = rng.zipf(1.3) % 300, f"i{rng.integers(200)}"
            tags = "|".join(f"t{tag}" for tag in rng.integers(20, size=rng.integers(4)))
            writer.writerow([rng.integers(2), user, item, tags, rng.normal()])
    return path


def test_from_data_to_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = _write_table(tmp_path / "events.csv")
    result = _run(
        *(
            "--data",
            data,
            "--lists",
            "tags",
            "--features",
            4,
            "--threshold",
            30,
            "--num-bytes",
            "5kB",
        ),
        *("--output", "plan.toml", "--picture", "plan.png"),
    )
    assert result.exit_code == 0, result.stderr
    for word in ("user_id", "item", "tags", "ids to a row", "of 5.0 kB on one device"):
        assert word in result.stdout
    assert "plan.toml" in result.stderr
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    small = '\nbottom_mlp = "8"\ntop_mlp = "8"\nevaluations = 1\n'
    text = (tmp_path / "plan.toml").read_text()
    (tmp_path / "small.toml").write_text(text.replace("\n\n[", f"{small}\n[", 1))
    trained = CliRunner().invoke(
        cli.build_app(), ["train", "--config=small.toml", "--output-dir=run"]
    )
    assert trained.exit_code == 0, trained.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    in_all = re.search(r"tables of ([\d.]+) kB in all", text.replace("\n# ", " "))[1]
    assert records[-1]["embedding_bytes"] / 1000 == pytest.approx(float(in_all), abs=0.06)


def test_columns_whose_keys_keep_coming_get_tables_that_grow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = _write_table(tmp_path / "events.csv")
    (tmp_path / "own.toml").write_text("[columns.item]\nmin_count = 2\n")
    result = _run(
        *("--data", data, "--config", "own.toml", "--lists", "tags", "--features", 4),
        *("--threshold", 30, "--num-bytes", "25kB", "--dynamic-columns", "item,tags"),
        *("--admit-after", 3, "--output", "plan.toml", "--picture", "plan.png"),
    )
    assert result.exit_code == 0, result.stderr
    assert len(re.findall("rows of their own, the others", " ".join(result.stdout.split()))) == 2
    assert "indexes of keys of" in " ".join(result.stdout.split())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    small = '\nbottom_mlp = "8"\ntop_mlp = "8"\nevaluations = 1\n'
    text = (tmp_path / "plan.toml").read_text()
    (tmp_path / "small.toml").write_text(text.replace("\n\n[", f"{small}\n[", 1))
    item = tomllib.loads(text)["columns"]["item"]
    assert item.keys() >= {"dynamic", "admit_after", "key_bits"}
    assert "min_count" not in item
    trained = CliRunner().invoke(
        cli.build_app(), ["train", "--config=small.toml", "--output-dir=run"]
    )
    assert trained.exit_code == 0, trained.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    summary = json.loads(lines[-1])
    found = re.search(
        r"tables of ([\d.]+) kB and indexes of keys of ([\d.]+) kB", text.replace("\n# ", " ")
    )
    told = [float(size) for size in found.groups()]
    taken = [summary["embedding_bytes"] / 1000, summary["index_bytes"] / 1000]
    assert taken == pytest.approx(told, abs=0.06)


def test_the_survey_counts_as_the_vocabulary_does(tmp_path):
    data = _write_table(tmp_path / "events.csv")
    settings = Settings(data=str(data), lists="tags", min_count=2, test_rows=100)
    with Display(Console(quiet=True)) as display:
        columns, rows = planning_run.survey(settings, display)
    assert rows == 300
    lines = list(csv.DictReader(data.read_text().splitlines()))[:300]
    items = [line["item"] for line in lines]
    counts = [items.count(item) for item in set(items)]
    common = sorted((count for count in counts if count >= 2), reverse=True)
    rare = sum(count for count in counts if count < 2)
    assert columns["item"].num_embeddings == len(common) + 1
    assert sorted(columns["item"].counts, reverse=True) == list(columns["item"].counts)
    assert sorted(columns["item"].counts) == sorted([*common, rare])
    tags = [tag for line in lines for tag in line["tags"].split("|") if tag]
    assert columns["item"].prior_count >= 1
    assert columns["tags"].length == pytest.approx(len(tags) / 300)


def test_counts_are_those_of_the_ids():
    counts = KeyCounts()
    counts.add(np.array([7, 7, 7, 9, 9, 5], np.uint64), np.array([0, 0, 0, 0, 0, 1], bool))
    for least, wanted in ((1, [3, 2, 1, 0]), (2, [3, 2, 1]), (4, [6])):
        assert list(counts.counts(least)) == wanted
        assert counts.vocabulary(least).num_embeddings == len(wanted)


def test_keys_of_columns_that_are_to_grow_are_counted_whatever_the_settings_say(tmp_path):
    data = _write_table(tmp_path / "events.csv")
    columns = {"user_id": {"hash_size": 1000}}
    settings = Settings(data=str(data), lists="tags", dynamic="1000", columns=columns)
    with Display(Console(quiet=True)) as display:
        found, _ = planning_run.survey(settings, display, ["item", "user_id"])
        without, _ = planning_run.survey(settings, display)
    assert found.keys() == {"user_id", "item"}
    assert all(column.counts is not None for column in found.values())
    assert without == {"user_id": Column(1000)}
    grown = {name: each._replace(dynamic="must") for name, each in found.items()}
    plan, sections = planned(
        settings, grown, 200_000, devices=1, optimizer="adagrad", num_examples=None
    )
    again = Settings(**tomllib.loads(planning_run.config_text(settings, sections, plan)))
    built = embed_configs(again, {"user_id": None, "item": None, "tags": None})
    assert _same({name: built[name] for name in found}, plan.configs)
    assert built["tags"].capacity == 1000


def _variance(groups):
    """The same of lists of clicks, by the sums of squares of an analysis of variance."""
    clicks = np.concatenate(groups)
    rate = clicks.mean()
    between = sum(len(group) * (group.mean() - rate) ** 2 for group in groups)
    freedom = len(clicks) - sum(len(group) ** 2 for group in groups) / len(clicks)
    noise = rate * (1 - rate)
    return max(0.0, (between - (len(groups) - 1) * noise) / freedom / noise)


@pytest.mark.parametrize("effect", [0.0, 0.25])
def test_ids_that_differ_by_more_than_chance_are_told(effect, rng):
    sizes = rng.integers(1, 60, 400)
    rates = 0.3 + effect * rng.choice([-1, 1], len(sizes))
    groups = [(rng.random(n) < rate).astype(float) for n, rate in zip(sizes, rates, strict=True)]
    met, clicked = KeyCounts(), KeyCounts()
    for key, group in enumerate(groups):
        keys, missing = np.full(len(group), key, np.uint64), np.full(len(group), key == 5)
        met.add(keys, missing)
        clicked.add(keys[group > 0], missing[group > 0])
    found = met.variance_between(clicked)
    assert found == pytest.approx(_variance(groups))
    assert found == pytest.approx(effect**2 / 0.21, abs=0.05)


def test_labels_of_one_kind_say_nothing():
    met, none = KeyCounts(), KeyCounts()
    met.add(np.array([1, 1, 2], np.uint64), np.zeros(3, bool))
    assert np.isnan(met.variance_between(none))
    assert np.isnan(met.variance_between(met))


# --- from sizes -----------------------------------------------------------------------------------

SAME = {
    "sizes.csv": "column,size,length,counts\nuser,3,1,70 20 10\nitem,200_000,,\n",
    "sizes.json": '{"user": {"size": 3, "counts": [70, 20, 10]}, "item": 200000}',
    "sizes.toml": "user = {size = 3, counts = [20, 70, 10]}\nitem = 200000\n",
}


@pytest.mark.parametrize("name", SAME)
def test_sizes_come_from_small_files(name, tmp_path):
    path = tmp_path / name
    path.write_text(SAME[name])
    columns = read_sizes(path)
    assert columns == {"user": Column(3, [70, 20, 10], 1.0), "item": Column(200_000)}


def test_a_plan_of_sizes_needs_no_data(tmp_path):
    (tmp_path / "sizes.csv").write_text("column,size\nuser,100000\nitem,20000\n")
    out = tmp_path / "plan.toml"
    result = _run(
        *("--sizes", tmp_path / "sizes.csv", "--num-bytes", "1MB", "--output", out, "--devices", 2)
    )
    assert result.exit_code == 0, result.stderr
    settings = load(out, {"data": "events.parquet"})
    assert settings.columns.keys() == {"user", "item"}
    assert settings.mesh == "data=2"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "name,size\nuser,3\n", "must name column and size, it names name, size"),
        ("a.csv", "column,size\nuser,many\n", "column user: size must be a positive .*'many'"),
        ("a.csv", "column,size\nuser,3\nuser,4\n", "column user is there twice"),
        ("a.csv", "column,size,counts\nuser,3,4 5\n", "column user: counts must be 3 numbers"),
        ("a.json", "{", "a.json cannot be read"),
        ("a.json", "{}", "must have a size for each column"),
        ("a.toml", "user = {size = 3, length = 0}", "column user: length must be above 0"),
        ("a.toml", "user = {size = 3, width = 1}", "there may be size, length, counts, got 'wid"),
        ("a.txt", "user 3", "must end in .csv, .json, .toml"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_sizes(tmp_path / name)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MB", 64_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("5_000", 5000),
        ("2kb", 2000),
        (".5M", 500_000),
    ],
)
def test_sizes_in_bytes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--num-bytes must be given"),
        (["--num-bytes", "lots"], "num_bytes must be a size such as 64MB, .* got 'lots'"),
        (["--num-bytes", "64MB"], "Either --data or --sizes must be given"),
        (["--num-bytes", "64MB", "--sizes", "none.csv"], "none.csv cannot be read"),
        (["--num-bytes", "64MB", "--data", "none.csv"], "There is no file or folder none.csv"),
        (["--num-bytes", "100", "--sizes", "sizes.csv"], "at least [0-9,]+, .* got 100"),
        (
            ["--num-bytes", "1MB", "--sizes", "sizes.csv", "--output", "sizes.csv"],
            "sizes.csv is there already: choose another file, or --overwrite it",
        ),
        (
            ["--num-bytes", "1MB", "--sizes", "sizes.csv", "--picture", "plan.jpg"],
            "--picture must end in .png, got 'plan.jpg'",
        ),
        (
            ["--num-bytes", "1MB", "--sizes", "sizes.csv", "--dynamic-columns", "user,it"],
            "--dynamic-columns must be of those planned for, user, got it",
        ),
        (
            ["--num-bytes", "1MB", "--sizes", "sizes.csv", "--admit-after", "3"],
            "--admit-after goes with --dynamic-columns or --allow-dynamic",
        ),
        (
            ["--num-bytes=1MB", "--sizes=sizes.csv", "--mesh=data=2,model=4", "--devices=8"],
            "--devices must be 4, over which mesh data=2,model=4 splits large tables, got 8",
        ),
    ],
)
def test_mistakes_are_sentences(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes.csv").write_text("column,size\nuser,100000\n")
    result = _run(*arguments)
    assert result.exit_code == 1
    assert re.search(words, result.stderr), result.stderr
    assert (tmp_path / "sizes.csv").read_text().startswith("column,size")


def test_the_least_budget_that_is_told_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes.csv").write_text("column,size\nuser,100000\nitem,5000\n")
    told = _run("--num-bytes", "100", "--sizes", "sizes.csv", "--devices", 2).stderr
    least = int(re.search(r"at least ([\d,]+)", told)[1].replace(",", ""))
    assert _run("--num-bytes", least, "--sizes", "sizes.csv", "--devices", 2).exit_code == 0
    assert _run("--num-bytes", least - 1, "--sizes", "sizes.csv", "--devices", 2).exit_code == 1


def test_help_says_what_to_give():
    text = _run("--help").stdout
    for option in ("--dynamic-columns", "--allow-dynamic", "--admit-after"):
        assert f"{option} " in text
    for option in ("--num-bytes", "--sizes", "--devices", "--optimizer", "--picture", "--label"):
        assert f"{option} " in text
    assert "64MB" in text
