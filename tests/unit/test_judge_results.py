"""What the judging stage says of a whole run: every measure beside every other, margins, ranking, cards."""

import json
import statistics

import pytest
from report_run import make_questions, write_run

from ray_jobs.judging.results import METRICS, compare_models, describe_judge, rank_models
from ray_jobs.reporting.run_files import read_run

JUDGES = ["coverage", "openai:stub"]
PAIRS = [("base", "teacher"), ("teacher", "student")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs"), make_questions(60), judges=JUDGES))


@pytest.fixture(scope="module")
def entries(run):
    return compare_models(PAIRS, JUDGES, run.verdicts, run.similarities, tie_bands={"cosine": 0.001}, seed=0)


def test_every_judge_stands_beside_every_metric_and_every_other_judge(entries):
    for entry in entries:
        sides = [(item["first"], item["second"]) for item in entry["agreements"]]
        assert sides == [(judge, metric) for judge in JUDGES for metric in METRICS] + [tuple(JUDGES)]
        for item in entry["agreements"]:
            assert sum(map(sum, item["table"])) == item["num"] >= item["decided"]["num"]
            assert sum(map(sum, item["decided"]["table"])) == sum(item["table"][i][j] for i in (0, 1) for j in (0, 1))
        # beside similarity, the figures are those of the headline
        assert entry["agreements"][0].items() >= entry["agreement_with_similarity"]["coverage"].items()
        assert 40 <= entry["jury"]["num"] <= 60
    json.dumps(entries, allow_nan=False)


def test_preferences_agree_with_the_counted_wins(entries):
    for entry in entries:
        for judge in JUDGES:
            preference, rate = entry["preferences"][judge], entry["win_rates"][judge]
            assert preference["num_questions"] == rate["wins_a"] + rate["wins_b"] + rate["ties"]
            # an order with a tie beside one with a win is three quarters here and a tie there
            counted = (rate["wins_a"] + 0.5 * rate["ties"]) / preference["num_questions"]
            assert preference["score"] == pytest.approx(counted, abs=0.06)
            assert preference["low"] < preference["score"] < preference["high"]
            assert preference["length_controlled"]["num_questions"] == preference["num_questions"]


def test_margins_are_the_distances_of_two_models_on_a_question(run, entries):
    cosines = {(row["model"], row["question_id"]): row["cosine"] for row in run.similarities}
    pairs = [(cosines["base", q["question_id"]], cosines["teacher", q["question_id"]]) for q in run.questions]
    distances = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    told = entries[0]["margins"]["similarity"]
    assert told["median"] == statistics.median(distances)
    assert told["ties"] == entries[0]["win_rates"]["similarity"]["ties"] == sum(distance <= 0.001 for distance in distances)


def test_three_models_are_ranked_and_two_are_not(run):
    ranking = rank_models(run.verdicts, "coverage", seed=0)
    assert {row["model"] for row in ranking} == {"base", "teacher", "student"}
    assert [row["strength"] for row in ranking] == sorted((row["strength"] for row in ranking), reverse=True)
    assert sum(row["strength"] for row in ranking) == pytest.approx(0, abs=1e-9)
    two = [row for row in run.verdicts if row["model_a"] == "base"]
    assert rank_models(two, "coverage", seed=0) == []


def test_people_are_one_more_judge(run):
    human = [{**row, "judge": "human"} for row in run.verdicts if row["judge"] == "coverage"]
    told = describe_judge([*run.verdicts, *human], "coverage", run.similarities, seed=0, human="human")
    assert told["human"]["kappa"] == 1.0 and told["human"]["num"] > 100
    other = describe_judge([*run.verdicts, *human], "openai:stub", run.similarities, seed=0, human="human")
    assert other["usability"]["word"] == "unusable"  # its verdicts were drawn at random
