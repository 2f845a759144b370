"""From TOML and overrides to a Config: what is accepted, and the one line for what is not."""

from pathlib import Path

import pytest

from ray_jobs.core.config import Config
from ray_jobs.core.config_file import flatten, load_config, to_toml, validate
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.sizes import parse_bytes

SHIPPED = sorted((Path(__file__).parents[2] / "ray_jobs" / "configs").glob("*.toml"))


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[run]\nname = "a"\n')
    return path


def message(path, *words):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(words))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_parses(path):
    assert load_config(path).run.name


def test_overrides_win_over_the_file_and_take_toml_values(minimal):
    config = load_config(minimal, ["--finetune.lora.rank", "8", "--student.layers=[0, 2]", "--run.storage", "s3://bucket/runs"])
    assert (config.finetune.lora.rank, config.student.layers, config.run.storage) == (8, [0, 2], "s3://bucket/runs")
    assert load_config(minimal, ["--finetune.lora.rank=8"]) == load_config(minimal, ["--finetune.lora.rank", "8"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--finetune.lora.rnk", "3"], "'finetune.lora.rnk': did you mean 'rank'?"),
        (["--finetun.lora.rank", "3"], "did you mean 'finetune'?"),
        (["--zzz.a", "1"], "known keys: run, teacher"),
        (["--finetune.lora.rank", "many"], "'finetune.lora.rank' = 'many': Input should be a valid integer"),
        (["--finetune.lora.rank", "0"], "= 0: Input should be greater than or equal to 1 (Rank r of the update BA)"),
        (["--student.layers", "[0, -1]"], "'student.layers.1' = -1: Input should be greater than or equal to 0"),
        (["--judge.pairs", '[["base", "gpt"]]'], "= 'gpt': Input should be 'base', 'teacher' or 'student'"),
        (["--data.documents", "notes.md"], "= 'notes.md': Input should be a valid list"),
        (["--finetune.method", "qlor"], "Input should be 'full', 'lora' or 'qlora'"),
        (["--finetune.method", "full", "--finetune.lora.dora", "true"], 'lora.dora = true needs an adapter and method = "full"'),
        (["--finetune.method", "full", "--finetune.lora.plus_ratio", "4"], "lora.plus_ratio = 4.0 needs an adapter"),
        (["--run.name", "a b"], "letters, digits, dot, dash, underscore"),
        (["--run.name", "../a"], "letters, digits, dot, dash, underscore"),
        (["--workers.memory", "16QB"], "'16QB' is not understood"),
        (["--distill.kd_temperature", "inf"], "'distill.kd_temperature' = inf: Input should be a finite number"),
        (["--distill.kd_weight", "0", "--distill.ce_weight", "0"], "all 0: nothing to learn"),
        (["--finetune.lora", "3"], "'finetune.lora' = 3"),
        (["--run.name.x", "1"], "'name' is a value, not a section"),
        (["--finetune.lora.rank"], "has no value"),
        (["finetune.lora.rank", "3"], "write --section.field value"),
        (["--rank", "3"], "write --section.field value"),
    ],
)
def test_a_wrong_override_is_one_line_with_the_value_and_the_way_out(minimal, words, expected):
    assert expected in message(minimal, *words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run", "is not TOML"),
        ("", "'run' is missing"),
        ("[run]\n", "'run.name' is missing"),
        ('[run]\nnme = "a"\n', "unknown config key 'run.nme': did you mean 'name'?"),
        ('run = "a"\n', "'run' = 'a'"),
        ("[run]\nname = 3\n", "'run.name' = 3"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, expected):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert expected in message(path)


def test_a_missing_file_a_folder_and_bytes_are_one_line(tmp_path):
    assert "No such file" in message(tmp_path / "none.toml")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in message(tmp_path / "bytes.toml")


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        validate({"run": {"name": "a"}}).run.name = "b"


def test_to_toml_reads_back_equal_whatever_text_is_in_it(tmp_path):
    config = validate(
        {
            "run": {"name": "a", "stages_from": ["s3://b/c", "runs/ä b"]},
            "data": {"system_prompt": 'quote " backslash \\ line\n tab\t del\x7f emoji 😀'},
            "student": {"layers": [0, 3]},
            "finetune": {"learning_rate": 1e-5, "max_steps": 3},
            "judge": {"pairs": [("base", "student")]},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_field_says_what_it_is():
    def walk(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                assert field.annotation.__doc__, prefix + name
                walk(field.annotation, f"{prefix}{name}.")
            else:
                assert field.description, prefix + name

    walk(Config)


@pytest.mark.parametrize(("text", "num_bytes"), [("16GiB", 16 * 2**30), ("16 GB", 16 * 10**9), ("1.5KiB", 1536), ("7B", 7)])
def test_sizes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "16", "GiB", "-1GiB", "1 gib", "1e3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="like 16GiB"):
        parse_bytes(text)


def test_flatten_names_leaves_by_their_dotted_path():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_unknown_key_in_a_named_table_names_the_nearest(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[judge.jury.second]\nmodell = "m"\n')
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        load_config(file)


def test_judge_that_nobody_defines(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[run]\nname = "a"\n[judge]\njudges = ["coverage", "claude"]\n')
    with pytest.raises(ConfigError, match=r"'claude'.*add \[judge\.jury\.claude\]"):
        load_config(file)
