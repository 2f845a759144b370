"""The answer in words: what a pair's test shows, and what it does not."""

from collections.abc import Mapping
from typing import Any

from ray_jobs.core.records import HUMAN, JURY, OFFLINE
from ray_jobs.reporting.numbers_in_words import NONE, number, p_value, percent
from ray_jobs.reporting.run_files import made_of_encoders

SIGNIFICANCE = 0.05
NAMES = {"base": "base", "teacher": "fine-tuned", "student": "student"}
_NOUNS = {"base": "base", "teacher": "fine-tuned model", "student": "student"}


def name(model: str) -> str:
    """Return what the report calls a model."""
    return NAMES.get(model, model)


def noun(model: str) -> str:
    """Return what a sentence calls a model, to follow "the"."""
    return _NOUNS.get(model, model)


def verdict_sentence(match: Mapping[str, Any]) -> str:
    """Return what one judge's wins show about the second model of a pair, with the figures."""
    test = f", {p_value(match['p_value'])}" if match["p_value"] is not None else ""
    return f"The {noun(match['model_2'])} {relation(match)} the {noun(match['model_1'])}: {match['measure']} {score(match)}{test}."


def score(match: Mapping[str, Any]) -> str:
    """Return the second model's wins to the first's, and the ties."""
    ties = f" with {match['ties']} tie{'s' * (match['ties'] > 1)}" if match["ties"] else ""
    return f"{match['wins_2']}:{match['wins_1']}{ties}"


def measure(judge: str) -> str:
    """Return how a judge is named beside its figures."""
    return {HUMAN: "people", JURY: "jury"}.get(judge, f"{judge} judge")


def who_judges(judge: str) -> str:
    """Return a judge as the subject of a sentence."""
    return "people" if judge == HUMAN else f"the {measure(judge)}"


def agreement_sentence(agreement: Mapping[str, Any]) -> str:
    """Return how far a judge and similarity agree on one pair."""
    scale = f"kappa {number(agreement['kappa'], 2)}; 0 is chance, 1 full agreement"
    return (
        f"{capital(name(agreement['model_1']))} against {name(agreement['model_2'])}: {who_judges(agreement['judge'])} and word-vector "
        f"similarity agree on {agreement['agreed']} of {agreement['num_questions']} questions ({scale})."
    )


def loss_sentence(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what can be said where nobody has judged: the held-out losses, an encoder's result, or that there are none yet."""
    if made_of_encoders(manifests):  # nobody answers, so nobody judges
        return str(manifests["distill"]["headline"][0]).replace("distill: ", "The student encoder: ", 1)
    found = manifests.get("finetune", {}).get("eval", {})
    if found.get("teacher_nats") is None or found.get("base_nats") is None:
        return "Nobody has judged this run's answers yet."
    relation = "lower than" if found["teacher_nats"] < found["base_nats"] else "not lower than"
    return (
        f"Nobody has judged this run's answers yet; the fine-tuned model's held-out loss is {relation} the base's: "
        f"{number(found['teacher_nats'])} against {number(found['base_nats'])} nats per token."
    )


def relation(match: Mapping[str, Any]) -> str:
    """Return what the exact test shows: that the second model "is better than" the first, "is worse than", or neither."""
    if match["p_value"] is None:
        return "cannot be compared with"
    if match["p_value"] >= SIGNIFICANCE:
        return "is not shown to be better than" if match["model_2"] != "student" else "is not shown to be better or worse than"
    return "is better than" if match["wins_2"] > match["wins_1"] else "is worse than"


def capital(text: str) -> str:
    """Return a text that begins a sentence."""
    return text[:1].upper() + text[1:]


def judge_in_words(judge: str, told: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return what a judge is.

    Args:
        told: what the judge stage says about it: `model`, `base_url`.
        settings: those of the judge stage, by dotted name.
    """
    model = told.get("model")
    if judge == OFFLINE:
        return (
            f"An offline judge, not a language model. It splits the sample answer into its statements and measures with {model} "
            f"which of them each answer covers (cosine from {settings.get('judge.coverage_threshold', NONE)}). It sees what is said, "
            "not whether the rest is true."
        )
    if judge == HUMAN:
        return "People, whose labels were imported: they calibrate the other judges."
    if judge == JURY:
        return "What more than half of the language models among the judges say of a question, else a tie."
    if not told.get("model"):
        return "Verdicts that were made elsewhere and imported."
    if str(told.get("place", "")).startswith("local:"):
        return f"The model {told['model']}, served by this run itself and asked in both orders of each pair of answers."
    endpoint = told.get("base_url") or "its provider's default endpoint"
    return f"The model that answers to the name {model} at {endpoint}, asked in both orders of each pair of answers."


def power_sentence(match: Mapping[str, Any]) -> str:
    """Return how many decided questions would show the win rate that was seen."""
    return (
        f"{capital(name(match['model_1']))} against {name(match['model_2'])}, {match['measure']}: a true win rate of "
        f"{percent(match['win_rate'])} would show with about {number(match['questions_needed'])} decided questions."
    )
