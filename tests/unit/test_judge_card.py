"""Judges with planted habits, and what their cards and the plain word say."""

import json

import numpy as np
import pytest

from ray_jobs.judging.judge_card import judge_card
from ray_jobs.judging.judge_verdict import Usability, jury_usability, usability
from ray_jobs.judging.results import describe_judge

OTHER = {"a": "b", "b": "a", "tie": "tie", None: None}


def lengths_of(num, generator):
    return {f"{model}{q}": int(generator.integers(20, 200)) for q in range(num) for model in ("x", "y")}


def verdicts_of(decide, *, num=100, repeats=1, judge="j", seed=0):
    """Rows of a judge. decide(question number, first answer's id, second's, generator) -> "first", "second", "tie" or None."""
    generator = np.random.default_rng(seed)
    rows = []
    for q in range(num):
        for swapped in (False, True):
            for repeat in range(repeats):
                shown = (f"y{q}", f"x{q}") if swapped else (f"x{q}", f"y{q}")
                said = decide(q, *shown, generator)
                position = {"first": "a", "second": "b", "tie": "tie", None: None}[said]
                row = {"question_id": str(q), "answer_a": f"x{q}", "answer_b": f"y{q}", "model_a": "x", "model_b": "y", "judge": judge}
                row |= {"swapped": swapped, "repeat": repeat, "winner": OTHER[position] if swapped else position}
                rows.append(row | {"unscored": "" if said else "no verdict", "explanation": "because"})
    return rows


LENGTHS = lengths_of(100, np.random.default_rng(7))


def truth(q):
    return "x" if (q * 7919) % 10 < 6 else "y"


def knows(q, first, second, generator):
    return "first" if first.startswith(truth(q)) else "second"


def always_first(q, first, second, generator):
    return "first"


def always_second(q, first, second, generator):
    return "second"


def longer(q, first, second, generator):
    return "first" if LENGTHS[first] > LENGTHS[second] else "second"


def always_tie(q, first, second, generator):
    return "tie"


def coin(q, first, second, generator):
    return generator.choice(["first", "second"])


def three_sided_coin(q, first, second, generator):
    return generator.choice(["first", "second", "tie"])


def often_silent(q, first, second, generator):
    return knows(q, first, second, generator) if generator.random() < 0.7 else None


def noisy(q, first, second, generator):
    return knows(q, first, second, generator) if generator.random() < 0.75 else coin(q, first, second, generator)


def card_of(decide, **options):
    return judge_card(verdicts_of(decide, **options), "j", lengths=LENGTHS)


@pytest.mark.parametrize(
    ("decide", "reason"),
    [
        (always_first, "the answer read first wins 100%"),
        (always_second, "the answer read first wins 0%"),
        (longer, "the longer answer wins 100%"),
        (always_tie, "calls 100% of the games a tie"),
        (coin, "not shown to agree better than chance"),
        (three_sided_coin, "not shown to agree better than chance"),
        (often_silent, "of its games have no verdict"),
    ],
)
def test_a_judge_that_does_not_judge_is_unusable_and_the_reason_is_named(decide, reason):
    word, reasons = usability(card_of(decide))
    assert word == "unusable"
    assert any(reason in text for text in reasons), reasons


def test_a_judge_that_knows_is_usable_and_its_card_is_exact():
    card = card_of(knows, repeats=2)
    assert card.position_consistency.value == card.repeat_stability.value == card.order_kappa.kappa == 1.0
    assert card.first_position_rate.value == 0.5
    assert (card.num_questions, card.num_games, card.unscored_share) == (100, 400, 0.0)
    assert usability(card) == ("usable", ["not compared with people's verdicts: consistent is not yet right"])


def test_a_judge_for_whom_one_model_always_wins_is_not_called_a_coin():
    def one_sided(q, first, second, generator):
        return "first" if first.startswith("x") == (q != 3) else "second"

    assert usability(card_of(one_sided)).word == "usable"


def test_a_model_that_always_writes_more_is_no_preference_for_length():
    lengths = {id_: 100 + 50 * id_.startswith("x") for id_ in LENGTHS}
    rows = verdicts_of(lambda q, first, second, generator: "first" if first.startswith("x") else "second")
    card = judge_card(rows, "j", lengths=lengths)
    assert card.longer_rate.value == 1.0 and card.length_preference.value is None
    assert usability(card).word == "usable"


def test_length_preference_is_half_for_a_judge_who_minds_only_the_models():
    rows = verdicts_of(lambda q, first, second, generator: "first" if first.startswith("x") else "second")
    assert judge_card(rows, "j", lengths=LENGTHS).length_preference.value == pytest.approx(0.5)


def test_noise_shows_as_instability_and_not_as_position():
    card = card_of(noisy, repeats=3)
    assert card.position_consistency.low < card.repeat_stability.value < card.position_consistency.high
    assert card.first_position_rate.low < 0.5 < card.first_position_rate.high
    assert usability(card).word == "weak"
    assert "asked again in the same order" in " ".join(usability(card).reasons)


def test_consistency_is_counted_by_hand():
    def flips(q, first, second, generator):
        return "first" if q < 30 else knows(q, first, second, generator)

    card = card_of(flips)
    assert card.position_consistency.value == 0.7
    assert card.first_position_rate.value == pytest.approx((60 + 70) / 200)
    assert usability(card).word == "weak"


def test_repeats_add_no_questions():
    one, many = card_of(longer), card_of(longer, repeats=5)
    assert many.length_preference == pytest.approx(one.length_preference)
    assert many.position_consistency == one.position_consistency


def test_people_overrule_consistency():
    human = verdicts_of(coin, judge="human", seed=5)
    card = judge_card(verdicts_of(knows) + human, "j", lengths=LENGTHS, human="human")
    assert 30 <= card.human.num <= 100
    assert usability(card).word == "unusable" and "agreement with people" in usability(card).reasons[0]
    agreeing = judge_card(verdicts_of(knows) + verdicts_of(knows, judge="human"), "j", lengths=LENGTHS, human="human")
    assert agreeing.human.kappa == 1.0 and usability(agreeing) == ("usable", [])


def test_a_judge_that_agrees_with_people_on_nearly_all_is_not_condemned_where_one_model_nearly_always_wins():
    def all_but(exceptions):
        return lambda q, first, second, generator: "first" if first.startswith("x") != (q in exceptions) else "second"

    rows = verdicts_of(all_but({1, 2, 3})) + verdicts_of(all_but({11, 12, 13}), judge="human")
    card = judge_card(rows, "j", lengths=LENGTHS, human="human")
    assert card.human.kappa < 0 and card.human_share.value == pytest.approx(0.94) and card.human_share.low > 0.75
    assert usability(card) == ("weak", ["it agrees with people at kappa -0.03 on 100 labels (94% the same)"])


def test_an_order_without_a_verdict_tilts_no_first_position_rate():
    rows = verdicts_of(lambda q, first, second, generator: "first" if first.startswith("x") else "second")
    for row in rows[1:80:2]:  # the swapped game of the first 40 questions
        row |= {"winner": None, "unscored": "no verdict"}
    card = judge_card(rows, "j", lengths=LENGTHS)
    assert card.first_position_rate.value == 0.5 and card.first_position_rate.num_questions == 60


@pytest.mark.parametrize(("num", "word"), [(19, "weak"), (20, "unusable")])
def test_few_questions_condemn_no_judge_as_a_coin(num, word):
    found = usability(card_of(coin, num=num, seed=3))
    assert found.word == word and "not shown to agree better than chance" in found.reasons[0] and f"on {num} questions" in found.reasons[0]


@pytest.mark.parametrize(("num", "word"), [(4, "weak"), (5, "usable")])
def test_a_judge_that_never_differs_from_itself_is_soon_no_coin(num, word):
    one_sided = verdicts_of(lambda q, first, second, generator: "first" if first.startswith("x") == (q != 1) else "second", num=num)
    assert usability(judge_card(one_sided, "j", lengths={})).word == word


def test_a_jury_is_no_better_than_its_members():
    own = Usability("usable", ["not compared with people's verdicts"])
    words = {
        ("unusable", "usable"): "unusable",
        ("unusable", "usable", "usable"): "weak",
        ("weak", "weak", "usable"): "weak",
        ("weak", "usable"): "usable",
    }
    for members, word in words.items():
        assert jury_usability(own, dict(zip("abc", members, strict=False))).word == word, members
    assert jury_usability(own, {"a": "unusable", "b": "unusable"}).reasons[0] == "2 of its 2 members (a, b) are unusable"
    assert jury_usability(Usability("unusable", []), {"a": "weak", "b": "weak"}).word == "unusable"


def test_canaries():
    rows = verdicts_of(knows)
    fooled = judge_card(rows, "j", lengths=LENGTHS, canaries_followed=[True, False, False])
    assert usability(fooled).word == "weak" and "obeyed 1 of 3" in usability(fooled).reasons[0]
    assert usability(judge_card(rows, "j", lengths=LENGTHS, canaries_followed=[True, True, False])).word == "unusable"


def test_no_verdicts_one_verdict_and_one_order():
    assert usability(judge_card([], "j", lengths={})) == ("unusable", ["it has judged nothing"])
    one_order = [row for row in verdicts_of(knows, num=20) if not row["swapped"]]
    card = judge_card(one_order, "j", lengths={})
    assert card.position_consistency.value is card.first_position_rate.value is card.longer_rate.value is None
    usability(judge_card(verdicts_of(knows, num=1)[:1], "j", lengths={}))


def test_the_card_is_json():
    similarities = [{"answer_id": id_, "num_tokens": length} for id_, length in LENGTHS.items()]
    told = describe_judge(verdicts_of(noisy, repeats=2), "j", similarities, seed=0)
    again = json.loads(json.dumps(told, allow_nan=False))
    assert again["usability"]["word"] in ("usable", "weak", "unusable")
    assert again["position_consistency"]["num_questions"] == 100
