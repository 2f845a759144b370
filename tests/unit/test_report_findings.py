"""What the report says, against counts by hand and against the judging stage's own statistics."""

import csv
import dataclasses
import io
import json
import random

import pytest
from report_run import TIE_BAND, config_of, make_questions, write_run

from ray_jobs import report
from ray_jobs.core.errors import StageMissing
from ray_jobs.judging.results import compare_models
from ray_jobs.reporting.comparisons import FIRST_COLUMNS, compare, to_csv, verdicts_to_csv
from ray_jobs.reporting.findings import agreements, matches
from ray_jobs.reporting.numbers_in_words import duration, number, p_value, percent, size
from ray_jobs.reporting.run_files import read_run
from ray_jobs.reporting.sentences import verdict_sentence
from ray_jobs.reporting.spreadsheet_csv import FORMULA, read_csv, write_csv
from ray_jobs.reporting.summary import summarise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs"), make_questions(60), judges=("coverage", "openai:stub")))


@pytest.fixture(scope="module")
def rows(run):
    return compare(run, tie_band=run.tie_band)


def _match(wins_1, wins_2, ties=0, p=0.5, model_1="base", model_2="teacher"):
    return {
        "model_1": model_1,
        "model_2": model_2,
        "measure": "coverage judge",
        "wins_1": wins_1,
        "wins_2": wins_2,
        "ties": ties,
        "p_value": p,
    }


def test_each_pair_judge_and_question_has_one_row(run, rows):
    keys = [(row.model_1, row.model_2, row.judge, row.question_id) for row in rows]
    assert len(keys) == len(set(keys)) == 2 * 2 * 60
    assert [row.question_id for row in rows[:60]] == [question["question_id"] for question in run.questions]


def test_counts_and_statistics_are_those_of_the_judging_stage(run, rows):
    judges = ["coverage", "openai:stub"]
    pairs = [("base", "teacher"), ("teacher", "student")]
    expected = compare_models(pairs, judges, run.verdicts, run.similarities, tie_bands={"cosine": TIE_BAND}, seed=run.seed)
    for entry in expected:
        for judge in (*judges, None):
            of_judge = entry["win_rates"][judge or "similarity"]
            found = next(
                m for m in matches(rows) if (m["model_1"], m["model_2"], m["judge"]) == (entry["model_a"], entry["model_b"], judge)
            )
            assert (found["wins_1"], found["wins_2"]) == (of_judge["wins_a"], of_judge["wins_b"])
            assert (found["ties"], found["unscored"]) == (of_judge["ties"], of_judge["unscored"])
            assert found["p_value"] == pytest.approx(of_judge["p_value"])
            assert found["win_rate"] == pytest.approx(1 - of_judge["rate"])
            assert (found["low"], found["high"]) == pytest.approx((1 - of_judge["high"], 1 - of_judge["low"]))
        for judge in judges:
            agreed = entry["agreement_with_similarity"][judge]
            found = next(a for a in agreements(rows, seed=run.seed) if (a["model_1"], a["judge"]) == (entry["model_a"], judge))
            assert (found["kappa"], found["low"], found["high"]) == (agreed["kappa"], agreed["low"], agreed["high"])
            assert found["agreed"] == round(agreed["share"] * agreed["num"])
            assert [list(row.values()) for row in found["table"].values()] == agreed["table"]


def test_totals_add_up_to_the_questions(rows):
    for match in matches(rows):
        assert match["wins_1"] + match["wins_2"] + match["ties"] + match["unscored"] == 60
    for item in agreements(rows, seed=0):
        assert sum(count for row in item["table"].values() for count in row.values()) == item["num_questions"] == 60 - item["left_out"]


def test_the_sentence_claims_no_more_than_the_test_shows():
    assert verdict_sentence(_match(43, 48, 9, 0.67)) == (
        "The fine-tuned model is not shown to be better than the base: coverage judge 48:43 with 9 ties, p = 0.67."
    )
    assert verdict_sentence(_match(20, 60, 0, 1e-5)) == "The fine-tuned model is better than the base: coverage judge 60:20, p < 0.001."
    assert "60:20 with 1 tie," in verdict_sentence(_match(20, 60, 1, 1e-5))
    assert "is worse than" in verdict_sentence(_match(60, 20, 0, 1e-5))
    assert "is not shown to be better or worse than the fine-tuned model" in verdict_sentence(_match(5, 4, 0, 1.0, "teacher", "student"))
    assert "cannot be compared" in verdict_sentence(_match(0, 0, 9, None))


def test_csv_has_the_contract_columns_first_and_texts_that_begin_with_a_word_unchanged(tmp_path):
    nasty = 'He said "no", then\r\nleft; =1+1,\u202eabc </textarea>'
    folder = write_run(tmp_path, make_questions(3), answer_of=lambda q, model, i: f"{nasty} {model}")
    found = read_run(folder)
    table = list(csv.DictReader(io.StringIO(to_csv(compare(found, tie_band=0.0)).decode(), newline="")))
    assert tuple(table[0])[: len(FIRST_COLUMNS)] == FIRST_COLUMNS
    assert table[0]["answer_1"] == f"{nasty} base"
    assert {row["llm_winner"] for row in table} <= {"1", "2", "tie", "unscored"}


def test_no_text_of_a_model_is_a_formula_to_a_spreadsheet_and_all_are_read_back(tmp_path):
    texts = ["- Prozesse teilen nichts", "=1+1", "\t=1+1", "'=1+1", "''-", "'tis", "＝1", "@SUM(A1)", "plain", "-", ""]
    folder = write_run(tmp_path, make_questions(len(texts)), answer_of=lambda q, model, i: texts[i])
    found = read_run(folder)
    verdicts = [{**row, "explanation": texts[i % len(texts)]} for i, row in enumerate(found.verdicts)]
    for content, column in ((to_csv(compare(found, tie_band=0.0)), "answer_1"), (verdicts_to_csv(verdicts), "explanation")):
        cells = [row[column] for row in csv.DictReader(io.StringIO(content.decode(), newline=""))]
        assert not [cell for cell in cells if cell.startswith(tuple(FORMULA))] and "'- Prozesse teilen nichts" in cells
        assert [row[column] for row in read_csv(content)][: len(texts)] == texts
    assert write_csv(["difference"], [{"difference": -0.25}]) == b"difference\r\n-0.25\r\n"


def test_a_judges_cost_is_unknown_where_one_call_has_no_price_and_rules_cost_nothing(run):
    asked, settled = {"prompt_tokens": 100, "completion_tokens": 50, "raw": "{}"}, {"prompt_tokens": 0, "completion_tokens": 0, "raw": ""}

    def cost(*costs):
        changes = [asked | {"cost_usd": usd} for usd in costs] + [settled | {"cost_usd": None}]
        verdicts = [row | change for row, change in zip(run.verdicts, changes, strict=False)]
        changed = dataclasses.replace(run, verdicts=verdicts)
        return summarise(changed, compare(changed, tie_band=0.0))["judges"][0]["cost_usd"]

    assert cost(0.01, 0.02) == pytest.approx(0.03) and cost(0.0) == 0.0
    assert cost(0.01, None) is None and cost() is None


def test_the_same_files_give_the_same_bytes(tmp_path):
    folder = write_run(tmp_path, make_questions(12))
    config = config_of(tmp_path)
    names = ("report.json", "report.html", "comparisons.csv")
    report.run(config, force=False)
    first = [folder.folder("report").read_bytes(name) for name in names]
    report.run(config, force=True)
    assert [folder.folder("report").read_bytes(name) for name in names] == first


def test_report_json_states_what_was_found_and_where_from(tmp_path):
    folder = write_run(tmp_path, make_questions(12))
    manifest = report.run(config_of(tmp_path), force=False)
    told = folder.folder("report").read_json("report.json")
    assert told["schema_version"] == 1
    assert manifest["headline"][0] == told["answer"]
    assert manifest["headline"][-1].endswith("report/report.html")
    assert told["losses"]["finetune"] == {"base_nats": 2.7401, "teacher_nats": 2.3123}
    assert [row["name"] for row in told["compression"]][:3] == ["base", "teacher", "student"]
    assert told["provenance"]["versions"]["raystill"] and told["provenance"]["config"]["run"]["name"] == "house"
    assert told["judges"][0]["judge"] == "coverage"
    assert told["stages"]["finetune"]["seconds"] >= 0


def test_one_more_finished_stage_makes_the_report_anew(tmp_path):
    questions = make_questions(6)
    folder = write_run(tmp_path, questions, stages=("prepare", "finetune", "distill", "answer"))
    config = config_of(tmp_path)
    first = report.run(config, force=False)
    assert report.run(config, force=False)["id"] == first["id"]
    assert folder.folder("report").read_json("report.json")["missing"] == ["judge", "compress"]
    write_run(tmp_path, questions)
    assert report.run(config, force=False)["id"] != first["id"]
    assert folder.folder("report").read_json("report.json")["missing"] == []


def test_without_a_judge_the_losses_speak_and_nobody_wins(tmp_path):
    folder = write_run(tmp_path, make_questions(6), stages=("prepare", "finetune", "answer"))
    report.run(config_of(tmp_path), force=False)
    told = folder.folder("report").read_json("report.json")
    assert told["answer"].startswith("Nobody has judged this run's answers yet; the fine-tuned model's held-out loss is lower")
    assert told["matches"] == told["agreement"] == []
    table = list(csv.DictReader(io.StringIO(folder.folder("report").read_bytes("comparisons.csv").decode())))
    assert {row["llm_winner"] for row in table} == {row["cos_winner"] for row in table} == {"unscored"}


def test_losses_that_were_not_measured_are_left_out(tmp_path):
    folder = write_run(tmp_path, make_questions(3), stages=("prepare", "finetune", "distill"))
    for stage in ("finetune", "distill"):
        manifest = folder.folder(stage).read_json("manifest.json")
        unmeasured = {**manifest, "eval": dict.fromkeys(manifest["eval"])}
        folder.folder(stage).write_json("manifest.json", unmeasured)
    assert report.run(config_of(tmp_path), force=False)["headline"][0] == "Nobody has judged this run's answers yet."
    assert "Held-out text, nats" not in folder.folder("report").read_bytes("report.html").decode()


def test_nothing_prepared_is_one_clear_error(tmp_path):
    with pytest.raises(StageMissing, match="prepare"):
        report.run(config_of(tmp_path), force=False)
    assert not (tmp_path / "house" / "report").exists()


def test_numbers_of_a_stage_whose_input_was_made_anew_are_named_as_outdated(tmp_path):
    folder = write_run(tmp_path, make_questions(6))
    answers = folder.folder("answer")
    answers.write_json("manifest.json", {**answers.read_json("manifest.json"), "id": "another"})
    run = read_run(folder)
    assert run.outdated == {"judge": ["answer"]}
    assert summarise(run, compare(run, tie_band=0.0))["outdated"] == {"judge": ["answer"]}


def test_order_dependent_verdicts_count_as_ties_and_lower_the_consistency(run, rows):
    told = summarise(run, rows)["judges"][0]
    assert told["verdicts"] == 240 and told["pairs"] == 120
    assert 0.8 < told["consistent_share"] < 1


def test_numbers_in_words():
    assert (number(1234567), number(2.31234), number(-0.061, 2), number(None)) == ("1,234,567", "2.312", "\u22120.06", "–")
    assert (number(0.00001234), number(float("nan"))) == ("0.000012", "–")
    assert (p_value(0.0004), p_value(0.04), p_value(0.671), p_value(None)) == ("p < 0.001", "p = 0.040", "p = 0.67", "–")
    assert (p_value(0.0496), p_value(0.0504), p_value(0.04999)) == ("p = 0.0496", "p = 0.0504", "p just below 0.05")
    assert (percent(0.527), percent(None)) == ("53\u202f%", "–")
    assert (size(134_500_000), size(12_300_000), size(999), size(None)) == ("134\u202fMB", "12.3\u202fMB", "999\u202fB", "–")
    assert (duration(3.21), duration(123), duration(3840), duration(None)) == (
        "3.2\u202fs",
        "2\u202fmin 03\u202fs",
        "1\u202fh 04\u202fmin",
        "–",
    )


def test_random_outcomes_never_break_the_findings(rows):
    draw = random.Random(0)
    for _ in range(50):
        some = [
            row.model_copy(update={"llm_winner": draw.choice(["1", "2", "tie", "unscored"]), "cos_winner": draw.choice(["1", "unscored"])})
            for row in rows[: draw.randrange(1, 8)]
        ]
        json.dumps([matches(some), agreements(some, seed=0)], allow_nan=False)
