"""Bad input of prepare: one line, exit code 2, nothing half-written, and no Ray started for it."""

import json
import shutil

import pytest
import ray

from ray_jobs.__main__ import main
from ray_jobs.core.errors import DataError
from ray_jobs.prepare import check


@pytest.fixture
def command(tiny_model, tiny_course, tmp_path, capsys):
    """Runs `raystill prepare` with overrides and returns (exit code, stderr)."""
    config = tmp_path / "run.toml"
    config.write_text(
        f"[run]\nname = 'tiny'\nstorage = '{tmp_path}/runs'\n[teacher]\nmodel = '{tiny_model}'\n"
        f"[data]\ndocuments = ['{tiny_course}/notes.md']\npairs = ['{tiny_course}/pairs.jsonl']\n"
        f"questions = '{tiny_course}/questions.jsonl'\n"
    )

    def call(*overrides):
        code = main(["prepare", str(config), *overrides])
        return code, capsys.readouterr().err

    return call


def refused(command, tmp_path, *overrides):
    was_connected = ray.is_initialized()
    code, err = command(*overrides)
    assert ray.is_initialized() == was_connected
    assert code == 2 and err.count("\n") == 1 and err.startswith("raystill: ")
    assert not (tmp_path / "runs").exists()
    return err


@pytest.mark.parametrize("field", ["documents", "pairs"])
def test_a_missing_file(command, tmp_path, field):
    assert f"[data] {field} '/no/such.csv'" in refused(command, tmp_path, f"--data.{field}", '["/no/such.csv"]')


def test_missing_questions(command, tmp_path):
    assert "[data] questions '/no/q.jsonl'" in refused(command, tmp_path, "--data.questions", "/no/q.jsonl")


def test_a_suffix_that_cannot_be_read(command, tmp_path):
    (tmp_path / "a.docx").write_text("x")
    assert "'.docx' cannot be read" in refused(command, tmp_path, "--data.documents", f'["{tmp_path}/a.docx"]')


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_corpus(command, tmp_path, content):
    documents = []
    if content is not None:
        (tmp_path / "empty.md").write_text(content)
        documents = [f"{tmp_path}/empty.md"]
    assert "corpus is empty" in refused(command, tmp_path, "--data.documents", json.dumps(documents), "--data.pairs", "[]")


def test_nothing_to_train_on(command, tmp_path):
    assert "nothing to train on" in refused(command, tmp_path, "--data.pairs", "[]", "--data.train_on_chunks", "false")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question": "Q?"}], "`reference` is missing"),
        ([{"question": "Q?", "reference": "R."}] * 2, "stands twice"),
        ([], "no row in it"),
    ],
)
def test_questions_that_cannot_be_used(command, tmp_path, rows, words):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert words in refused(command, tmp_path, "--data.questions", f"{tmp_path}/q.jsonl")


def test_a_model_folder_without_a_tokenizer(command, tmp_path, tiny_model):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*token*"))
    assert "no tokenizer" in refused(command, tmp_path, "--teacher.model", str(bare))


def test_check_reads_what_the_config_names(tiny_config, tiny_course):
    inputs = check(tiny_config())
    assert [file.name for file in inputs.files] == [str(tiny_course / "notes.md"), str(tiny_course / "pairs.jsonl")]
    assert len(inputs.questions) == 4 and inputs.questions[0].topic == "kernel"
    with pytest.raises(DataError):
        check(tiny_config(data__questions=str(tiny_course)))
