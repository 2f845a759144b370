"""Do the intervals tell the truth? Simulated judges with planted bias, and PandaLM's published verdicts.

python -m benchmarks.judge_statistics [DATA]

DATA (or $PANDALM_DATA) is a folder with PandaLM's testset-v1.json and gpt-3.5-turbo-testset-v1.json (github.com/WeOpenML/PandaLM,
Apache-2.0). Without it only the simulation runs.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import expit

from ray_jobs.core.records import Winner
from ray_jobs.judging.agreement import agreement
from ray_jobs.judging.bradley_terry import Meeting, bradley_terry
from ray_jobs.judging.judge_card import judge_card
from ray_jobs.judging.length_control import length_controlled
from ray_jobs.judging.pairs import pair_results
from ray_jobs.judging.pooling import words
from ray_jobs.judging.win_rates import preference, question_scores, win_rate

Row = dict[str, Any]
REPEATS = 2
TRUTH_QUESTIONS = 40_000
SPREAD = 1.5
"""Standard deviation, in log odds, of how much better one answer is than the other, over questions."""
PANDALM: dict[str, Winner] = {"0": "tie", "1": "a", "2": "b", "Tie": "tie"}


class Habits(NamedTuple):
    """A simulated judge, in log odds: what it adds for the first place, for far more words, and its share of ties."""

    quality: float
    position: float
    length: float
    ties: float


JUDGES = {
    "fair": Habits(0.3, 0.0, 0.0, 0.1),
    "first place": Habits(0.3, 1.0, 0.0, 0.1),
    "length": Habits(0.3, 0.0, 1.5, 0.1),
    "place, length and ties": Habits(0.6, 0.7, 1.0, 0.3),
}


class Games(NamedTuple):
    """Verdicts +1 (a), -1 (b), 0 (tie) by question, order (a first, b first) and repeat; lengths; people's verdicts."""

    verdicts: np.ndarray
    lengths: np.ndarray
    human: np.ndarray


def play(habits: Habits, num: int, generator: np.random.Generator) -> Games:
    """Return the games of `num` questions. Side a writes a little more; a person sees the quality and errs at random."""
    quality = habits.quality + generator.normal(0, SPREAD, num)
    lengths = generator.integers(60, 140, (num, 2)) + np.array([10, 0])
    longer = np.tanh((lengths[:, 0] - lengths[:, 1]) / LENGTH_SD)
    logit = (quality + habits.length * longer)[:, None] + habits.position * np.array([1, -1])
    decided = generator.random((num, 2, REPEATS)) >= habits.ties
    verdicts = np.where(generator.random((num, 2, REPEATS)) < expit(logit)[:, :, None], 1, -1) * decided
    human = np.where(generator.random(num) < expit(2 * quality), 1, -1)
    return Games(verdicts, lengths, human)


LENGTH_SD = float(np.sqrt(2 * (80**2 - 1) / 12))
SIDES: dict[int, Winner] = {1: "a", -1: "b", 0: "tie"}


def rows_of(games: Games) -> list[Row]:
    """Return the Verdict rows of the judge, and of a person (once a question)."""
    rows = []
    for q, verdicts in enumerate(games.verdicts):
        common = {"question_id": str(q), "model_a": "x", "model_b": "y", "answer_a": f"x{q}", "answer_b": f"y{q}"}
        common |= {"unscored": "", "explanation": ""}
        rows += [
            {**common, "judge": "j", "swapped": bool(order), "repeat": repeat, "winner": SIDES[int(verdicts[order, repeat])]}
            for order in (0, 1)
            for repeat in range(REPEATS)
        ]
        rows.append({**common, "judge": "human", "swapped": False, "repeat": 0, "winner": SIDES[int(games.human[q])]})
    return rows


def estimates(games: Games, *, seed: int) -> dict[str, tuple[float, float, float]]:
    """Return {what: (figure, low, high)} as a report would state them, by the code that states them."""
    rows = rows_of(games)
    lengths = {f"{model}{q}": int(games.lengths[q, i]) for q in range(len(games.verdicts)) for i, model in enumerate("xy")}
    card = judge_card(rows, "j", lengths=lengths, human="human", seed=seed)
    scores = list(question_scores(rows, "j", "x", "y").values())
    won = win_rate(result.winner for result in pair_results(rows, "j"))
    liked, controlled = preference(scores), length_controlled(scores, games.lengths[:, 0], games.lengths[:, 1])
    found = {
        "win rate": (won.rate, won.low, won.high),
        "preference (ties half)": (liked.score, liked.low, liked.high),
        "length-controlled": (controlled.rate, controlled.low, controlled.high),
        "slope on length": (controlled.slope, controlled.slope_low, controlled.slope_high),
        "kappa with people": (card.human.kappa, card.human.low, card.human.high),
        "kappa of the two orders": (card.order_kappa.kappa, card.order_kappa.low, card.order_kappa.high),
    }
    for what in ("position_consistency", "repeat_stability", "first_position_rate", "longer_rate", "tie_rate"):
        rate = getattr(card, what)
        found[what.replace("_", " ")] = (rate.value, rate.low, rate.high)
    return found


def by_game(games: Games) -> tuple[float, float]:
    """Return the preference's interval when single games count as independent: the row bootstrap, for contrast."""
    points = (games.verdicts.ravel() + 1) / 2
    half = 1.96 * points.std() / np.sqrt(len(points))
    return points.mean() - half, points.mean() + half


def simulate(habits: Habits, *, runs: int, num: int) -> dict[str, tuple[float, float, int]]:
    """Return {what: (planted value, mean estimate, runs whose interval has the planted value)}."""
    generator = np.random.default_rng(0)
    # the planted values are those of so many questions that their own error is a twentieth of a run's
    truth = {what: figure for what, (figure, _, _) in estimates(play(habits, TRUTH_QUESTIONS, generator), seed=0).items()}
    covered: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for run in range(runs):
        games = play(habits, num, generator)
        for what, (figure, low, high) in estimates(games, seed=run).items():
            covered[what] += low <= truth[what] <= high
            sums[what] += figure
        low, high = by_game(games)
        covered["preference, counting games"] += low <= truth["preference (ties half)"] <= high
    truth["preference, counting games"] = truth["preference (ties half)"]
    sums["preference, counting games"] = sums["preference (ties half)"]
    return {what: (planted, sums[what] / runs, covered[what]) for what, planted in truth.items()}


def simulate_ranking(*, runs: int, num: int) -> dict[str, tuple[float, float, int]]:
    """Return the same for the Bradley-Terry strengths of three models whose games on a question share its surprises."""
    planted, generator = np.array([0.6, 0.0, -0.6]), np.random.default_rng(1)

    def meet(count: int) -> list[Meeting]:
        strengths = planted + generator.normal(0, SPREAD, (count, 3))
        pairs = [(i, j) for i in range(3) for j in range(i + 1, 3)]
        scores = {(i, j): generator.binomial(4, expit(strengths[:, i] - strengths[:, j])) / 4 for i, j in pairs}
        return [Meeting(str(q), "xyz"[i], "xyz"[j], float(scores[i, j][q])) for q in range(count) for i, j in pairs]

    truth = {entry.model: entry.strength for entry in bradley_terry(meet(TRUTH_QUESTIONS), seed=0, samples=2)}
    covered: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for run in range(runs):
        for entry in bradley_terry(meet(num), seed=run, samples=500):
            covered[entry.model] += entry.low <= truth[entry.model] <= entry.high
            sums[entry.model] += entry.strength
    return {f"strength of {model}": (truth[model], sums[model] / runs, covered[model]) for model in "xyz"}


def table(found: dict[str, tuple[float, float, int]], runs: int) -> str:
    """Return a Markdown table of planted values, mean estimates and coverage."""
    lines = ["| figure | planted | mean estimate | intervals with the planted value |", "|---|---|---|---|"]
    lines += [f"| {what} | {p:.3f} | {mean:.3f} | {num} of {runs} ({num / runs:.1%}) |" for what, (p, mean, num) in found.items()]
    return "\n".join(lines)


def pandalm(folder: Path) -> str:
    """Return a Markdown table: agreement of people among themselves and with gpt-3.5-turbo and with "longer wins"."""
    pairs = json.loads((folder / "testset-v1.json").read_text(encoding="utf-8"))
    replies = json.loads((folder / "gpt-3.5-turbo-testset-v1.json").read_text(encoding="utf-8"))
    people = [[PANDALM[str(pair[f"annotator{i}"])] for pair in pairs] for i in (1, 2, 3)]
    most = [Counter(said).most_common(1)[0][0] if len(set(said)) < 3 else None for said in zip(*people, strict=True)]
    said_by_idx = {reply["idx"]: PANDALM.get(str(reply["gpt_result"])) for reply in replies}
    gpt = [said_by_idx[pair["idx"]] for pair in pairs]
    sizes = [(len(words(str(pair["response1"]))), len(words(str(pair["response2"])))) for pair in pairs]
    longer: list[Winner] = ["tie" if a == b else "a" if a > b else "b" for a, b in sizes]
    questions = [pair["instruction"] + pair["input"] for pair in pairs]
    sides = {f"annotators {i + 1} and {j + 1}": (people[i], people[j]) for i, j in ((0, 1), (0, 2), (1, 2))}
    sides |= {
        "gpt-3.5-turbo and the majority": (gpt, most),
        "the same, its unreadable replies as ties": (["tie" if x is None else x for x in gpt], most),
        "longer wins and the majority": (longer, most),
        "gpt-3.5-turbo and longer wins": (gpt, longer),
    }
    lines = ["| who | verdicts | agree | kappa, questions as clusters |", "|---|---|---|---|"]
    for who, (first, second) in sides.items():
        found = agreement(first, second, questions=questions, seed=0)
        lines.append(f"| {who} | {found.num} | {found.share:.1%} | {found.kappa:.2f} [{found.low:.2f}, {found.high:.2f}] |")
    counts = ", ".join(f"{label} {most.count(label)}" for label in ("tie", "a", "b"))
    return "\n".join([f"{len(pairs)} pairs of answers to {len(set(questions))} questions; majorities: {counts}", "", *lines])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", nargs="?", default=os.environ.get("PANDALM_DATA"), help="folder with PandaLM's JSON files; else $PANDALM_DATA"
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    runs, num = options.runs, options.questions
    low, high = stats.binom.interval(0.99, runs, 0.95)
    print(f"{runs} runs of {num} questions, 2 orders, {REPEATS} repeats.")
    print(f"Honest 95% intervals have the planted value in {low:.0f} to {high:.0f} of {runs} runs (99 times in 100).")
    for name, habits in JUDGES.items():
        print(f"\nJudge: {name} {tuple(habits)}\n\n{table(simulate(habits, runs=runs, num=num), runs)}", flush=True)
    print(f"\nThree models\n\n{table(simulate_ranking(runs=runs, num=num), runs)}", flush=True)
    if options.data:
        print(f"\nPandaLM: {pandalm(Path(options.data))}")


if __name__ == "__main__":
    main()
