"""Options from defaults, file and command line; and every way to get them wrong."""

import pytest

from qrhash.ctr.config_file import load
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import widths
from qrhash.ctr.settings import Settings, options


def _load(tmp_path, text, **given):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load(path, given)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    settings = _load(tmp_path, "collisions = 8\nfeatures = 32\n", features=8)
    assert (settings.collisions, settings.features) == (8, 8)
    assert settings.threshold == Settings().threshold


def test_a_column_differs_where_its_section_says(tmp_path):
    settings = _load(
        tmp_path,
        "collisions = 8\n[columns.C3]\npartition = 'mixed-radix'\nradices = [10, 20]\n",
    )
    column = settings.column("C3")
    assert (column.partition, column.radices, column.collisions) == ("mixed-radix", (10, 20), 8)
    assert settings.column("C4").partition == Settings().partition


WRONG = {
    "unknown key": ("colisions = 8", r"'colisions' in .*run.toml; is it 'collisions'\?"),
    "wrong type": ("features = 'wide'", "features must be an integer, got 'wide'"),
    "bool": ("features = true", "features must be an integer, got True"),
    "float for int": ("features = 8.0", "features must be an integer, got 8.0"),
    "nan": ("table_lr = nan", "table_lr must be a number, got nan"),
    "choice": ("model = 'gpt'", "model must be one of dlrm, dcn, two-tower, got 'gpt'"),
    "too small": ("batch_size = 0", "batch_size must be at least 1, got 0"),
    "optional": ("hash_size = 1", "hash_size must be at least 2, got 1"),
    "fraction": ("test_fraction = 1.0", "test_fraction must be above 0 and below 1"),
    "widths": ("top_mlp = '512-x'", "top_mlp must be positive widths"),
    "column name": ("[columns.C27]\n", "columns.C27 goes with --data; Criteo's are C1 to C26"),
    "too large": ("features = 65_537", "features must be at most 65536, got 65537"),
    "like no other": ("x1 = 3", r"Unknown option 'x1' in .*run.toml\.$"),
    "column key": ("[columns.C1]\nfeatures = 2", "Unknown option 'features' in .*columns.C1"),
    "column type": ("[columns.C1]\nmoduli = [1, 'a']", "moduli must be a list of integers"),
    "no section": ("columns = 3", "columns must be sections"),
    "column no section": ("columns.C1 = 3", "columns.C1 must be a section"),
    "not toml": ("= 3", "run.toml is not TOML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_sentence(name, tmp_path):
    text, pattern = WRONG[name]
    with pytest.raises(UserError, match=pattern) as error:
        _load(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent.toml cannot be read: No such file"):
        load(tmp_path / "absent.toml", {})


def test_a_run_that_is_resumed_takes_over_all_but_where_it_is():
    kept = {"data": "a", "max_bad_lines": 5000, "checkpoint_every": 10, "keep_checkpoints": 50}
    begun = Settings(**kept, mesh="data=8", output_dir="out", features=8).as_dict()
    assert load(None, {"resume": True}, begun) == Settings(**kept, features=8, resume=True)
    anew = {"data": "b", "max_bad_lines": 0, "checkpoint_every": 0, "keep_checkpoints": 1}
    assert load(None, anew, begun) == Settings(**anew, features=8)


def test_options_of_a_run_that_is_resumed_are_first_held_against_those_it_began_with(tmp_path):
    """And not against one another without its data, as those of a new run are."""
    options = {"resume": True, "output_dir": "out", "list_length": 3}
    assert load(None, options) == Settings(resume=True, output_dir="out")
    with pytest.raises(UserError, match="list_length goes with a table in --data"):
        load(None, {"list_length": 3})
    begun = Settings(data="a", list_length=5, columns={"x": {"widths": [3, 4]}}).as_dict()
    with pytest.raises(UserError, match="list_length was 5, got 3; leave it out to go on"):
        load(None, options, begun)
    assert load(None, options | {"list_length": 5}, begun).list_length == 5
    with pytest.raises(UserError, match="Unknown option 'lenght' in "):
        load(None, {"resume": True, "lenght": 5}, begun)
    path = tmp_path / "run.toml"
    path.write_text("[columns.x]\nwidths = [3, 4]\n")
    assert load(path, {"resume": True}, begun).columns == {"x": {"widths": [3, 4]}}


def test_whole_numbers_are_numbers(tmp_path):
    assert _load(tmp_path, "table_lr = 1").table_lr == 1


def test_every_option_has_a_help_line():
    for name, _, _, option in options():
        assert option.help.endswith("."), name


def test_widths():
    assert widths("top_mlp", "512-256") == (512, 256)
    assert widths("top_mlp", "") == ()
