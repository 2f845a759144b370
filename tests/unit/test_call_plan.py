"""What a judge will cost, said before a call is sent: an upper bound without answers, exact with them, nothing for what is kept."""

import pytest

from ray_jobs import judge, plan
from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigError
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.storage import Storage
from ray_jobs.distillation.identity import teacher_identity
from ray_jobs.judging.call_plan import games_to_plan, in_words, plan_calls
from ray_jobs.judging.calls import Prices, Reply
from ray_jobs.judging.canaries import make_canaries
from ray_jobs.judging.ledger import Ledger
from ray_jobs.judging.openai_judge import ModelJudge
from ray_jobs.judging.pairs import make_games
from ray_jobs.judging.prices import LISTED, are_known, prices_of
from ray_jobs.judging.rubric import RUBRIC

QUESTIONS = [{"question_id": f"q{n}", "question": "Why?", "reference": f"Sample {n}.", "language": "en"} for n in range(10)]
JUDGE = ModelJudge("openai", "gpt-4o", "", 800, True, Prices(2.5, 10.0), 0)


def games_of(text_of):
    answers = {
        model: [
            {"answer_id": f"{model}{n}", "question_id": f"q{n}", "model": model, "text": text_of(model, n), "finish_reason": "stop"}
            for n in range(10)
        ]
        for model in ("base", "teacher")
    }
    return make_games(QUESTIONS, answers, [("base", "teacher")])


@pytest.fixture
def planned(tmp_path):
    """A function that plans the calls of one judge, whose replies are kept in the test's own folder."""

    def plan_of(games, *, canaries=0, missing=0, judge_=JUDGE, rpm=None, tpm=None, backend="calls"):
        return plan_calls(
            judge_,
            games=games,
            canaries=make_canaries(QUESTIONS, canaries, seed=0),
            ledger=judge_.ledger(Storage(str(tmp_path))),
            missing_answer_tokens=missing,
            requests_per_minute=rpm,
            tokens_per_minute=tpm,
            backend=backend,
        )

    return plan_of


def test_equal_answers_are_no_calls_and_without_answers_all_games_are(planned):
    some_equal = games_of(lambda model, n: "same" if n < 4 else f"{model} says {n}")
    assert planned(some_equal).calls == 12 and planned(some_equal, canaries=3).calls == 15
    bound = planned(games_of(lambda model, n: model), canaries=3, missing=100)
    assert (bound.calls, bound.is_exact) == (23, False)
    assert bound.prompt_tokens.high >= 20 * 2 * 100
    assert "23 calls at most" in in_words(bound)[0]


def test_repeats_multiply_and_kept_replies_cost_nothing(planned, tmp_path):
    games, ledger = games_of(lambda model, n: f"{model} says {n}"), Ledger(Storage(str(tmp_path)))
    assert planned(games).calls == 20
    twice = JUDGE._replace(repeats=2)
    assert planned(games, judge_=twice).calls == 40
    for call in list(JUDGE.calls(games).values())[:5]:
        ledger.keep(call.key, Reply("{}", 0.1))
    found = planned(games)
    assert (found.calls, found.answered) == (15, 5)
    assert planned(games, judge_=twice).calls == 35
    assert planned(games, judge_=JUDGE._replace(model="other")).calls == 20


def test_price_and_minutes_are_ranges_of_the_tokens(planned):
    found = planned(games_of(lambda model, n: f"{model} says {n}"), rpm=40, tpm=10_000)
    assert found.completion_tokens == (20 * 60, 20 * 800)
    assert found.usd.high == pytest.approx(round(found.prompt_tokens.high) * 2.5e-6 + 20 * 800 * 10e-6)
    assert found.usd.low < found.usd.high
    assert found.minutes == pytest.approx((found.prompt_tokens.high + found.completion_tokens.high) / 10_000)
    assert planned(games_of(lambda model, n: f"{model} {n}"), rpm=40).minutes == 0.5
    batch = planned(games_of(lambda model, n: f"{model} says {n}"), backend="batch")
    assert batch.usd == (pytest.approx(found.usd.low / 2), pytest.approx(found.usd.high / 2)) and batch.calls == found.calls
    slow = planned(games_of(lambda model, n: f"{model} says {n}"), backend="batch", rpm=1)
    assert slow.minutes is None and "up to a day" in in_words(slow)[1]
    unknown = planned(games_of(lambda model, n: f"{model} {n}"), judge_=JUDGE._replace(prices=Prices()))
    assert (unknown.usd, unknown.minutes) == (None, None)
    assert planned(games_of(lambda model, n: f"{model} {n}"), judge_=JUDGE._replace(prices=Prices(1.0, None)), backend="batch").usd is None
    assert "unknown price" in in_words(unknown)[1] and "learned from the endpoint" in in_words(unknown)[1]


def test_the_prompts_of_a_plan_have_the_schema_and_cut_replies_are_said_to_be_left_out(planned):
    games = games_of(lambda model, n: f"{model} says {n}")
    with_schema, without = planned(games), planned(games, judge_=JUDGE._replace(structured=False))
    assert with_schema.prompt_tokens.high - without.prompt_tokens.high > 20 * 100
    assert "without replies that are cut" in in_words(with_schema)[1]


def test_where_no_call_is_left_there_is_nothing_to_pay_whatever_the_price(planned, tmp_path):
    games, unknown = games_of(lambda model, n: f"{model} says {n}"), JUDGE._replace(prices=Prices())
    for call in unknown.calls(games).values():
        Ledger(Storage(str(tmp_path))).keep(call.key, Reply("{}", 0.1))
    found = planned(games, judge_=unknown)
    assert (found.calls, found.usd) == (0, (0.0, 0.0))
    [line] = in_words(found)
    assert line.endswith("20 are answered already; nothing is left to pay")


def test_listed_prices_are_of_the_providers_own_endpoint_alone():
    given = {"prompt": None, "completion": None}
    assert prices_of("gpt-4o", base_url=None, **given) == prices_of("gpt-4o-2024-08-06", base_url=None, **given) == LISTED["gpt-4o"]
    assert not are_known(prices_of("gpt-4o", base_url="http://localhost:8000/v1", **given))
    assert not are_known(prices_of("gpt-4o-audio-preview", base_url=None, **given))
    assert prices_of("gpt-4o", prompt=1.0, completion=None, base_url=None) == Prices(1.0, 10.0)


def test_a_budget_in_dollars_without_prices_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    tree = {"run": {"name": "r", "storage": str(tmp_path)}, "answer": {"models": ["base", "teacher"]}}
    section = {"pairs": [["base", "teacher"]], "judges": ["openai"], "budget_usd": 1.5, "openai": {"model": "own-model"}}
    with pytest.raises(ConfigError, match=r"budget_usd = 1\.5 cannot be kept: the price of judge 'openai' \('own-model'\) is unknown"):
        judge.check(validate({**tree, "judge": section}))
    priced = {"model": "own-model", "usd_per_million_prompt_tokens": 1, "usd_per_million_completion_tokens": 1}
    judge.check(validate({**tree, "judge": {**section, "openai": priced}}))


def two_models(folder, model, *, questions, **judge):
    """The tree of a config whose base and teacher meet on questions from a file."""
    file = folder / "questions.jsonl"
    file.write_text("".join(f'{{"question": "{question}", "reference": "So."}}\n' for question in questions))
    return {
        "run": {"name": "r", "storage": str(folder)},
        "teacher": {"model": str(model)},
        "student": {"layers": 2},
        "data": {"questions": str(file)},
        "answer": {"models": ["base", "teacher"]},
        "judge": {"pairs": [["base", "teacher"]], **judge},
    }


def test_the_plan_counts_judge_calls_from_the_questions_file_on(tmp_path, tiny_model):
    tree = two_models(tmp_path, tiny_model, questions=["Why?", "Warum?"], judges=["coverage", "openai"], openai={"requests_per_minute": 4})
    told = plan.run(validate(tree), force=False)
    assert [(entry["judge"], entry["calls"], entry["canaries"]) for entry in told["judge"]] == [("openai:gpt-4o", 8, 4)]
    assert told["judge"][0]["minutes"] == 2.0
    assert any("judge openai:gpt-4o: 8 calls at most" in line for line in told["headline"])
    assert not RunFolder(validate(tree)).storage.exists("replies")
    none = plan.run(validate({**tree, "judge": {}}), force=False)
    assert none["judge"] == [] and not any(line.startswith("judge") for line in none["headline"])


def test_the_plan_finds_the_kept_replies_of_a_model_of_our_own(tmp_path, tiny_model):
    tree = two_models(tmp_path, tiny_model, questions=["Why?"], judges=["own"], canaries=0, jury={"own": {"local": str(tiny_model)}})
    config = validate(tree)
    none = plan.run(config, force=False)
    assert [(entry["calls"], entry["answered"]) for entry in none["judge"]] == [(2, 0)]
    identity = teacher_identity(tiny_model, dtype=config.answer.dtype)
    options = config.judge.jury["own"].model_dump()
    own = ModelJudge.of("own", options, seed=config.run.seed, repeats=1, rubric=RUBRIC, identity=identity)
    games = games_to_plan([{"question_id": "q", "question": "Why?", "reference": "So."}], None, config.judge.pairs)
    first, _ = own.calls(games).values()
    own.ledger(RunFolder(config).storage.sub("replies")).keep(first.key, Reply("{}", 0.1))
    told = plan.run(config, force=False)
    assert [(entry["calls"], entry["answered"]) for entry in told["judge"]] == [(1, 1)]
    assert any("1 are answered already" in line for line in told["headline"]) and any(
        "no price; made in" in line for line in told["headline"]
    )
