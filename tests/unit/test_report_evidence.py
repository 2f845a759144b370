"""Plots, cards and the table by language, against counts by hand and the judging stage's own facts."""

import csv
import io
from dataclasses import replace

import pytest
from report_run import TIE_BAND, config_of, make_questions, write_run

from ray_jobs import report
from ray_jobs.core.records import Similarity
from ray_jobs.judging.results import METRICS, metric_winners
from ray_jobs.reporting.comparisons import compare
from ray_jobs.reporting.evidence_view import evidence_view
from ray_jobs.reporting.interval_chart import Interval, interval_chart
from ray_jobs.reporting.judge_view import judge_view, jury_sentences
from ray_jobs.reporting.kappa_matrix import kappa_matrix
from ray_jobs.reporting.languages import encoder_sentences, language_sentences
from ray_jobs.reporting.measures import length_correlations
from ray_jobs.reporting.run_files import read_run
from ray_jobs.reporting.scatter import MOST_POINTS, scatter
from ray_jobs.reporting.sentences import measure
from ray_jobs.reporting.summary import summarise

JUDGES = ("coverage", "openai:stub", "other:stub", "jury", "human")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs"), make_questions(96), judges=JUDGES, measured=True))


@pytest.fixture(scope="module")
def told(run):
    return summarise(run, compare(run, tie_band=run.tie_band))


def test_intervals_stand_on_one_axis_and_say_themselves_in_words():
    entries = [Interval("first", 0.25, 0.0, 0.5, "25 %"), Interval("second", 1.0, 0.5, 1.0, "100 %")]
    chart = interval_chart("Wins", entries, reference=0.5, left_label="a", right_label="b", limits=(0, 1), shares=True)
    assert [row.low for row in chart.rows] == [chart.axis[0], chart.reference]
    assert chart.rows[1].x == chart.rows[1].high == chart.axis[1]
    assert chart.rows[0].y < chart.rows[1].y < chart.bottom < chart.height
    assert chart.summary == "first: 25 %; second: 100 %."
    assert [tick.label for tick in chart.ticks] == ["0\u202f%", "50\u202f%", "100\u202f%"]
    assert interval_chart("Wins", [], reference=0.5, left_label="", right_label="") is None


def test_every_judge_and_metric_is_plotted_with_the_interval_of_the_table(run, told):
    chart = evidence_view(run, told)["wins"][0]
    start, end = chart.axis
    labels = [row.label for row in chart.rows]
    assert [row.label for row in chart.rows if not row.kind] == [measure(judge) for judge in JUDGES]
    assert {"similarity", "SIF cosine", "token F1", "ties as halves"} <= set(labels)
    first = next(match for match in told["matches"] if match["judge"] == "coverage")
    assert chart.rows[0].x == pytest.approx(start + first["win_rate"] * (end - start), abs=0.1)
    halves = told["judging"][0]["preferences"]["coverage"]["score"]
    assert chart.rows[labels.index("ties as halves")].x == pytest.approx(end - halves * (end - start), abs=0.1)


def test_other_metrics_win_as_the_judging_stage_counts_them(run, told):
    for metric, column in METRICS.items():
        tie_band = TIE_BAND if column == "cosine" else 0
        winners = list(metric_winners(run.similarities, "base", "teacher", column=column, tie_band=tie_band).values())
        match = next((m for m in told["matches"] if m["metric"] == metric and m["model_1"] == "base"), None)
        if match is None:
            assert not any(winners)
        else:
            assert (match["wins_1"], match["wins_2"], match["ties"]) == tuple(winners.count(side) for side in ("a", "b", "tie"))


def test_the_matrix_has_every_judge_beside_every_metric_and_judge(run, told):
    matrix = evidence_view(run, told)["agreement"][0]
    assert [row.label for row in matrix.rows] == list(JUDGES)
    pairs = len(JUDGES) * (len(JUDGES) - 1) / 2
    scored = {agreed["second"] for agreed in told["judging"][0]["agreements"] if agreed["kappa"] is not None} - set(JUDGES)
    assert len(matrix.cells) == len(JUDGES) * len(scored) + pairs
    assert all(0 <= cell.strength <= 1 and cell.x + matrix.cell_width <= matrix.width + 1e-6 for cell in matrix.cells)
    assert "coverage and human: " in matrix.summary
    assert kappa_matrix("none", [{"first": "x", "second": "y", "kappa": None}], {}) is None


def test_a_ranking_needs_three_models(run, told):
    charts = evidence_view(run, told)["ranking"]
    assert len(charts) == len(JUDGES) and {row.kind for row in charts[0].rows} == {"base", "teacher", "student"}


def test_large_groups_of_points_are_thinned_and_it_is_said():
    points = [(float(i), 0.5) for i in range(10_000)]
    plot = scatter("Length", {"base": points, "teacher": []}, {"base": "base, rho 0.1"}, x_label="words", y_label="cosine")
    assert list(plot.groups) == ["base"] and 0 < len(plot.groups["base"]) <= MOST_POINTS
    assert plot.summary.endswith(f"{len(plot.groups['base'])} of 10,000 points are drawn.")
    assert scatter("Length", {"base": []}, {}, x_label="", y_label="") is None


def test_length_correlation_is_spearmans(run):
    same = {"answer_id": "a", "question_id": "q", "model": "base", "sif_cosine": None, "token_f1": None, "oov_share": 0}
    rows = [Similarity(cosine=i**2 / 400, num_tokens=i, **same) for i in range(20)]
    found = length_correlations(replace(run, similarities=[row.model_dump() for row in rows]))
    assert found == {"base": pytest.approx(1.0)}


def test_cards_come_from_the_judge_stage_and_leave_out_what_it_did_not_measure(run, told):
    cards = {judge["judge"]: judge_view(judge, run) for judge in told["judges"]}
    for judge in told["judges"]:
        entry = next(entry for entry in run.manifests["judge"]["judges"] if entry["name"] == judge["judge"])
        assert judge["card"] == entry["card"]
    labels = {name: [figure.label for figure in card["figures"]] for name, card in cards.items()}
    assert "Same winner in both orders" in labels["openai:stub"]
    assert "Same winner in both orders" not in labels["human"] + labels["coverage"]
    assert "Planted instructions obeyed" not in labels["openai:stub"]
    labelled = next(judge["card"]["human"]["num"] for judge in told["judges"] if judge["judge"] == "openai:stub")
    assert 55 <= labelled <= 64
    assert any(figure.text.endswith(f" on {labelled} labels") for figure in cards["openai:stub"]["figures"])
    assert "calibrate" in cards["human"]["kind"] and "more than half" in cards["jury"]["kind"]
    assert jury_sentences(told["judging"])[0].startswith("Base against fine-tuned: Krippendorff's alpha of the judges is ")


def test_a_card_tells_what_the_judge_stage_knows_beside_the_verdicts(run, told):
    judge = next(judge for judge in told["judges"] if judge["judge"] == "openai:stub")
    entry = {"name": "openai:stub", "model": "qwen-max", "family_of": "Qwen/Qwen2.5-0.5B", "stopped": "the budget is spent", "flagged": 3}
    other = {"file": "labels.csv", "annotators": 2, "answered_as": {"b": 3, "a": 1200}}
    stage = {**run.manifests["judge"], "judges": [entry | other]}
    facts = dict(judge_view(judge, replace(run, manifests={**run.manifests, "judge": stage}))["facts"])
    assert facts["Of the same family as"].startswith("Qwen/Qwen2.5-0.5B") and facts["Stopped"] == "the budget is spent"
    assert (facts["Imported from"], facts["Annotators"], facts["Flagged verdicts"]) == ("labels.csv", "2", "3")
    assert facts["Answered as several models"].startswith("a (1,200 replies), b (3 replies): ")


def test_canaries_are_on_the_card_where_there_were_any(run, told):
    judge = next(judge for judge in told["judges"] if judge["judge"] == "openai:stub")
    planted = {**judge, "card": {**judge["card"], "canaries": 4, "canaries_followed": 1}}
    assert "1 of 4" in [figure.text for figure in judge_view(planted, run)["figures"]]


def test_answers_without_a_cosine_are_counted_by_language_with_their_reason(run, told):
    german, english = told["languages"]
    assert (german["language"], german["questions"], german["answers"], german["without_cosine"]) == ("de", 12, 36, 36)
    assert sum(german["reasons"].values()) == 36 and english["without_cosine"] < 36
    assert list(german["reasons"]) == ["fewer than 50% of the answer's words have a vector"]
    for entry in (german, english):
        for match in entry["matches"]:
            counted = match["wins_1"] + match["wins_2"] + match["ties"] + match["unscored"]
            assert counted == entry["questions"]
    assert language_sentences(told["languages"], "glove-6b-50d")[0].startswith(
        "36 of 36 German answers have no cosine from the vectors glove"
    )
    assert not language_sentences([english], None)


def test_the_coverage_judges_word_on_a_language_its_encoder_was_not_trained_on_is_said_to_be_less_sure(told):
    said = [sentence for sentence in told["sentences"] if "was trained on English" in sentence]
    assert len(said) == 1 and "encoder minilm-l6" in said[0] and "on the 12 German questions" in said[0]
    english = [entry for entry in told["languages"] if entry["language"] == "en"]
    assert encoder_sentences(english, "minilm-l6") == encoder_sentences(told["languages"], None) == []
    assert encoder_sentences(told["languages"], "/models/multilingual") == []


def test_a_budget_that_ran_out_is_said_and_counted(tmp_path):
    folder = write_run(tmp_path, make_questions(12), judges=("openai:stub",))
    verdicts = folder.folder("judge").read_parquet("verdicts.parquet")
    stopped = {row["question_id"] for row in verdicts[-12:]}
    for row in verdicts:
        if row["question_id"] in stopped:
            row |= {"winner": None, "explanation": "", "unscored": "not asked: the budget of 36 calls is spent"}
    folder.folder("judge").write_parquet("verdicts.parquet", verdicts)
    report.run(config_of(tmp_path), force=False)
    told = folder.folder("report").read_json("report.json")
    assert told["judges"][0]["not_asked"] == 2 * len(stopped)
    assert any(f"was asked about {24 - 2 * len(stopped)} of 24 pairs" in sentence for sentence in told["sentences"])
    assert "not asked: the budget of 36 calls is spent" in told["judges"][0]["unscored_reasons"]


def test_verdicts_have_a_table_of_their_own(tmp_path):
    folder = write_run(tmp_path, make_questions(6), judges=("openai:stub",))
    report.run(config_of(tmp_path), force=False)
    table = list(csv.DictReader(io.StringIO(folder.folder("report").read_bytes("verdicts.csv").decode(), newline="")))
    rows = folder.folder("judge").read_parquet("verdicts.parquet")
    assert [row["verdict_id"] for row in table] == [row["verdict_id"] for row in rows]
    assert "raw" not in table[0] and {row["winner"] for row in table} <= {"a", "b", "tie", ""}
