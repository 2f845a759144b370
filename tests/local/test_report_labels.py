"""Marking one's own verdicts on the report: blind, offline, and back into the next judging."""

import csv
import io
import json
import re

import pytest
from report_run import PAIRS, config_of, make_questions, write_run

from ray_jobs import report
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.judging.imports import read_import
from ray_jobs.judging.pairs import make_games
from ray_jobs.reporting.run_files import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, make_questions(12), answer_of=lambda q, model, i: "The same." if i == 5 else f"The {model} answers part {i}.")
    report.run(config_of(folder), force=False)
    return folder


def _answer_ids(folder):
    run = read_run(RunFolder(config_of(folder)))
    return {(model, id_): row["answer_id"] for model, rows in run.answers.items() for id_, row in rows.items()}


def _games(folder):
    run = read_run(RunFolder(config_of(folder)))
    return make_games(run.questions, {model: list(rows.values()) for model, rows in run.answers.items()}, PAIRS)


def _questions(folder):
    return [json.loads(line) for line in (folder / "house" / "prepare" / "questions.jsonl").read_text().splitlines()]


def test_labels_are_given_blind_and_leave_as_a_file_that_judge_imports(run, open_report):
    page = open_report(run)
    page.fill("[name=annotator]", 'A "Q", B')
    page.click("#labelling button")
    page.locator("#desk .answers").wait_for()
    assert not page.locator("#questions").is_visible() and not page.locator("header").is_visible()
    assert "judge" not in page.locator("#desk").inner_text().lower()
    ids = {re.search(r"part (\d+)", q["question"])[1]: q["question_id"] for q in _questions(run)}
    given = []
    for shortcut, side in (("1", "Left"), ("2", "Right"), ("0", None)):
        text = page.locator("#desk").inner_text()
        answers = page.locator("#desk .answers > div").all_inner_texts()
        told = next(answer for answer in answers if answer.startswith(side)) if side else ""
        given.append((ids[re.search(r"part (\d+) of a kernel", text)[1]], "a" if "The base" in told else "b" if told else "tie"))
        page.keyboard.press(shortcut)
    page.keyboard.press("s")
    assert page.locator("#labelled").inner_text() == "3 of 11 labelled"
    files = {}
    for kind in ("csv", "jsonl"):
        with page.expect_download() as download:
            page.click(f"[data-format={kind}]")
        files[kind] = download.value.path().read_text(encoding="utf-8")
        assert download.value.suggested_filename == f"human_labels.{kind}"
    labels = list(csv.DictReader(io.StringIO(files["csv"], newline="")))
    told = {"model_a": "base", "model_b": "teacher", "annotator": 'A "Q", B'}
    ids = _answer_ids(run)
    assert labels == [
        {"question_id": id_, **told, "winner": winner, "answer_a": ids["base", id_], "answer_b": ids["teacher", id_]}
        for id_, winner in given
    ]
    assert [json.loads(line) for line in files["jsonl"].splitlines()] == labels
    for kind, text in files.items():
        imported = read_import(text.encode(), name=f"human_labels.{kind}", judge="human", games=_games(run))
        assert [(row["question_id"], row["winner"]) for row in imported.rows] == given
        assert (imported.facts["labels"], imported.facts["annotators"]) == (3, 1)
    page.keyboard.press("x")
    assert page.locator("#questions").is_visible()
