"""Several language models as one judge, and what a stopped stage says of itself."""

from ray_jobs.core.records import Verdict
from ray_jobs.judging.by_model import judge_by_model
from ray_jobs.judging.calls import Asked, Counters, Prices, Reply
from ray_jobs.judging.judged import Judged, account, asked_share, could_go_on, members_of
from ray_jobs.judging.jury import jury_rows
from ray_jobs.judging.openai_judge import ModelJudge, in_turn
from ray_jobs.judging.pairs import NOT_ASKED, Ruling, make_games, pair_results, verdict_row

QUESTIONS = [{"question_id": f"q{n}", "question": "?", "reference": "!"} for n in range(4)]
ANSWERS = {
    model: [{"answer_id": f"{model}{n}", "question_id": f"q{n}", "model": model, "text": model, "finish_reason": "stop"} for n in range(4)]
    for model in ("base", "teacher")
}
MAKERS = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", "openai/gpt-4.1", "HuggingFaceTB/SmolLM2-1.7B"]
MOVED = {"m1:x": {"x-0806": 5, "x-0513": 3}, "m2:x": {"x-0513": 8}}
GAMES = make_games(QUESTIONS, ANSWERS, [("base", "teacher")])


def rows_of(judge, words):
    """Rows of a judge that says the same in both orders; "-" was never asked."""
    rulings = {"-": Ruling(None, unscored=f"{NOT_ASKED}the budget is spent"), "t": Ruling("tie", "Even.")}
    said = [rulings.get(word) or Ruling(word, f"{judge} likes {word}.") for word in words for _ in range(2)]
    return [verdict_row(game, ruling, judge=judge, rubric_sha=judge) for game, ruling in zip(GAMES, said, strict=True)]


def told(judged):
    return account(judged, [], pairs=[("base", "teacher")], tie_bands={}, seed=0, min_known_share=0.85, makers=MAKERS)


def test_more_than_half_decide_and_nobody_makes_no_verdict():
    verdicts = [*rows_of("m1:x", "aab-"), *rows_of("m2:y", "abt-"), *rows_of("m3:z", "ba--")]
    rows = [Verdict(**row) for row in jury_rows(verdicts, ["m1:x", "m2:y", "m3:z"])]
    assert [row.winner for row in rows] == ["a", "a", "tie", None]
    assert rows[0].explanation.splitlines()[2] == "m3:z: answer 2. m3:z likes b."
    assert "no member of the jury scored it" in rows[3].unscored
    assert [result.winner for result in pair_results([row.model_dump() for row in rows], "jury")] == ["a", "a", "tie", None]
    assert jury_rows(verdicts, ["m1:x"]) == []


def test_a_jury_stands_beside_the_others_and_its_agreement_is_that_of_its_members():
    models = [
        Judged(name, rows_of(name, words), {"model": name[3:]}, is_model=True) for name, words in (("m1:x", "aabt"), ("m2:y", "aabt"))
    ]
    judged = [Judged("coverage", rows_of("coverage", "bbbb"), {}), *models]
    assert members_of(judged) == ["m1:x", "m2:y"] and members_of(judged[:2]) == []
    verdicts = [row for found in judged for row in found.rows]
    found = told([*judged, Judged("jury", jury_rows(verdicts, members_of(judged)), {})])
    [pair] = found["pairs"]
    assert [pair["win_rates"]["jury"][key] for key in ("wins_a", "wins_b", "ties")] == [2, 1, 1]
    assert pair["jury"]["alpha"] == 1.0
    sides = {(item["first"], item["second"]) for item in pair["agreements"]}
    assert ("coverage", "jury") in sides and ("m1:x", "m2:y") in sides and ("m1:x", "jury") not in sides
    assert found["jury"] == ["m1:x", "m2:y"]


def test_a_name_that_was_moved_to_another_model_in_mid_run_is_told():
    judged = [Judged(name, rows_of(name, "abab"), {"model": "x", "answered_as": names}, is_model=True) for name, names in MOVED.items()]
    [line] = [line for line in told(judged)["headline"] if "answered as" in line]
    assert line.startswith("judge: m1:x answered as several models, x-0513 (3), x-0806 (5): ")


def test_a_jury_of_judges_that_decide_nothing_is_unusable():
    models = [Judged(name, rows_of(name, words), {"model": "x"}, is_model=True) for name, words in (("m1:x", "tttt"), ("m2:y", "aabb"))]
    verdicts = [row for found in models for row in found.rows]
    found = told([*models, Judged("jury", jury_rows(verdicts, members_of(models)), {})])
    usability = found["judges"][2]["card"]["usability"]
    assert usability["word"] == "unusable" and usability["reasons"][0] == "1 of its 2 members (m1:x) is unusable"


def test_a_stop_is_told_with_its_share_and_with_what_goes_on():
    rows = rows_of("m1:x", "ab--")
    assert asked_share(rows) == {"games": 8, "asked": 4, "share": 0.5}
    found = told([Judged("m1:x", rows, {"model": "qwen-max"}, is_model=True, stopped="the budget is spent")])
    lines = found["headline"]
    card = found["judges"][0]["card"]
    assert (card["num_games"], card["unscored_share"], card["usability"]["word"]) == (4, 0.0, "weak")  # a stop is no fault of its judge
    assert any("m1:x was asked 4 of 8 games (50%)" in line and line.endswith("the budget is spent") for line in lines)
    assert any("m1:x is of the same family as Qwen/Qwen2.5-0.5B" in line for line in lines)
    assert found["judges"][0]["family_of"] == "Qwen/Qwen2.5-0.5B"
    other = told([Judged("m1:x", rows, {"model": "claude-3-5-sonnet"}, is_model=True)])
    assert other["judges"][0]["family_of"] is None and not any("family" in line for line in other["headline"])


def test_a_stopped_stage_goes_on_with_a_larger_budget_alone():
    stopped = {"budget": {"usd": 1.0, "calls": None, "stopped": ["the budget of $1 is spent"]}}
    assert could_go_on(stopped, budget_usd=2.0, max_calls=None) and could_go_on(stopped, budget_usd=None, max_calls=None)
    assert not could_go_on(stopped, budget_usd=1.0, max_calls=None) and not could_go_on(stopped, budget_usd=0.5, max_calls=None)
    assert not could_go_on(stopped, budget_usd=2.0, max_calls=10)
    assert not could_go_on({"budget": {"usd": 1.0, "calls": None, "stopped": []}}, budget_usd=2.0, max_calls=None)
    assert not could_go_on({}, budget_usd=2.0, max_calls=None)
    paused = {"budget": {"usd": None, "calls": None, "stopped": ["the endpoint asks to wait 3600 s"]}}
    assert could_go_on(paused, budget_usd=None, max_calls=None)


def test_calls_given_up_for_a_reason_that_passes_are_asked_again_by_the_same_command_and_told():
    judge = ModelJudge("m1", "x", "", 100, True, Prices(), 0)

    def ask(calls):
        failed = Reply("", 0.1, "Error code: 503 - busy", may_pass=True)
        refused = Reply("", 0.1, "Error code: 400 - too long")
        return Asked({call.key: failed if number < 3 else refused for number, call in enumerate(calls)}, Counters())

    games = [game._replace(text_a=f"{game.text_a} {game.question_id}", reference=game.question_id) for game in GAMES]
    found = judge_by_model(judge, games, [], ask=ask)
    manifest = told([found])
    assert found.facts["given_up_for_now"] == 3
    assert any("gave up 3 calls for reasons that may pass" in line for line in manifest["headline"])
    assert could_go_on(manifest, budget_usd=None, max_calls=None)
    refused = {"judges": [{**manifest["judges"][0], "given_up_for_now": 0}]}
    assert not could_go_on(refused, budget_usd=None, max_calls=None)


def test_people_are_told_by_their_own_agreement():
    people = Judged("human", rows_of("human", "abab"), {"annotators": 2, "annotator_agreement": {"alpha": 0.3, "num": 4}})
    usability = next(entry for entry in told([people])["judges"])["card"]["usability"]
    assert usability == {"word": "weak", "reasons": ["2 annotators agree at Krippendorff's alpha 0.30 on 4 questions"]}


def test_a_stop_leaves_whole_questions_in_a_random_order():
    ordered = in_turn([*GAMES, *(game._replace(repeat=1) for game in GAMES)], seed=3)
    assert [game.repeat for game in ordered] == [0] * 8 + [1] * 8
    assert [first.question_id for first in ordered[::2]] == [second.question_id for second in ordered[1::2]]
    assert ordered != in_turn(GAMES, seed=4)[:8]
    assert set(ordered[:8]) == set(GAMES)
