"""What judging and its report cannot use is one line on stderr and exit code 2, before anything is written or sent."""

import pytest
from report_run import make_questions, write_run

from ray_jobs import judge
from ray_jobs.__main__ import main
from ray_jobs.core.config_file import validate
from ray_jobs.core.run_folder import RunFolder

RUBRIC = "{question} {reference} {first}"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs `raystill JOB` on a run of two questions, and returns the one line of its refusal."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    folder = write_run(tmp_path, make_questions(2), stages=("prepare", "finetune", "distill", "answer", "judge"))
    file = tmp_path / "config.toml"

    def run(job, judge="", *arguments):
        file.write_text(f'[run]\nname = "house"\nstorage = "{tmp_path}"\n[judge]\n{judge}')
        assert main([job, str(file), *arguments]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        return line

    run.folder = folder
    return run


def without_manifest(folder: RunFolder):
    folder.folder("judge").delete("manifest.json")


def test_a_stage_is_made_for_good_with_what_decides_a_verdict_alone():
    tree = {"run": {"name": "r", "storage": "s"}, "judge": {"judges": ["coverage", "second"], "jury": {"second": {}, "idle": {}}}}
    fields = judge.deciding(validate(tree).judge)
    assert {"judge.pairs", "judge.repeats", "judge.jury.second.model", "judge.jury.second.max_tokens"} <= set(fields)
    assert not [field for field in fields if field.endswith((".timeout_s", ".api_key_env", "judge.max_calls", "judge.rubric"))]
    assert not [field for field in fields if field.startswith(("judge.openai", "judge.jury.idle"))]


def test_no_key(refused, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    without_manifest(refused.folder)
    assert "judge 'openai' reads its key from the environment variable OPENAI_API_KEY" in refused("judge", 'judges = ["openai"]')


def test_a_rubric_without_its_placeholders(refused, tmp_path):
    (tmp_path / "own.txt").write_text(RUBRIC)
    line = refused("judge", f'judges = ["openai"]\nrubric = "{tmp_path}/own.txt"')
    assert "own.txt' lacks {second}: it must have {question}, {reference}, {first} and {second}" in line
    assert "gone.txt' does not exist" in refused("judge", f'judges = ["openai"]\nrubric = "{tmp_path}/gone.txt"')
    assert "cannot be read (" in refused("judge", f'judges = ["openai"]\nrubric = "{tmp_path}"')
    (tmp_path / "old.txt").write_bytes("Größer? {question} {reference} {first} {second}".encode("latin-1"))
    assert "give a text file in UTF-8" in refused("judge", f'judges = ["openai"]\nrubric = "{tmp_path}/old.txt"')


def test_a_judge_that_is_not_there(refused):
    assert "judges names 'claude', which is none of" in refused("judge", 'judges = ["claude"]')
    assert "does not exist" in refused("judge", 'judges = ["own"]\n[judge.jury.own]\nlocal = "./no-such-folder"')


@pytest.mark.parametrize("url", ["not a url", "localhost:8000/v1", "ftp://host/v1", "http://", ""])
def test_an_address_that_is_none(refused, url):
    line = refused("judge", f'judges = ["openai"]\n[judge.openai]\nbase_url = "{url}"')
    assert f"'judge.openai.base_url' = {url!r}: write it like \"https://HOST/v1\"" in line


def test_answers_whose_questions_are_gone(refused):
    questions = refused.folder.folder("prepare")
    questions.write_jsonl("questions.jsonl", questions.read_jsonl("questions.jsonl")[1:])
    assert "the questions do not belong together (1 of them" in refused("judge")


def test_a_model_that_has_not_answered_yet_and_a_damaged_file(refused):
    without_manifest(refused.folder)
    answers = refused.folder.folder("answer")
    content = answers.read_bytes("student.parquet")
    answers.write_bytes("student.parquet", content[:200])
    assert "student.parquet is no Parquet file (" in refused("judge") and "with --force" in refused("judge")
    answers.delete("student.parquet")
    assert "has no answers of 'student': let it answer too with `raystill answer CONFIG --force`" in refused("judge")


def test_answers_of_another_schema_that_are_none_or_that_stand_twice(refused):
    without_manifest(refused.folder)
    answers = refused.folder.folder("answer")
    rows = answers.read_parquet("teacher.parquet")
    answers.write_parquet("teacher.parquet", [{**row, "schema_version": 0} for row in rows])
    assert "teacher.parquet has rows of schema version 0, and this program reads 1: make its stage anew" in refused("judge")
    answers.write_parquet("teacher.parquet", [{key: row[key] for key in row if key != "text"} for row in rows])
    assert "teacher.parquet has a row that is no answer (text: Field required): answer anew with" in refused("judge")
    answers.write_parquet("teacher.parquet", [*rows, {**rows[0], "text": "another"}])
    assert f"model 'teacher' has two answers to question_id {rows[0]['question_id']!r}: answer anew" in refused("judge")
    answers.write_parquet("teacher.parquet", rows)
    questions = refused.folder.folder("prepare")
    found = questions.read_jsonl("questions.jsonl")
    questions.write_jsonl("questions.jsonl", [*found, found[0]])
    assert f"question_id {found[0]['question_id']!r} stands twice in questions.jsonl" in refused("judge")


def test_verdicts_of_an_older_schema(refused):
    folder = refused.folder.folder("judge")
    folder.write_parquet("verdicts.parquet", [{**row, "schema_version": 0} for row in folder.read_parquet("verdicts.parquet")])
    line = refused("report")
    assert "verdicts.parquet has rows of schema version 0, and this program reads 1: make its stage anew with --force" in line


def test_files_of_labels(refused, tmp_path):
    assert "no such file" in refused("judge", f'[judge.imports]\nhuman = "{tmp_path}/gone.csv"')
    labels = tmp_path / "labels.csv"
    labels.write_text("question_id,model_a,model_b,winner\nq,base,teacher,a\n")
    assert "labels.csv line 2: question_id 'q' is none of the run's 2 questions" in refused("judge", f'[judge.imports]\nhuman = "{labels}"')
    assert "as the jury or a metric is called" in refused("judge", f'[judge.imports]\njury = "{labels}"')
