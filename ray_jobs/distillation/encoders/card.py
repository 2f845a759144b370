"""The exported encoder's README.md: teacher, data, losses, layers, training, and what was retained; nothing of the machine."""

from typing import Any

from ray_jobs.distillation.encoders.outcome import TERMS
from ray_jobs.distillation.model_card import Lineage, front_matter, loss_table, model_lines, public_name, share_of, table_row

PIPELINE_TAGS = {"masked_language_model": "fill-mask", "embedding": "feature-extraction", "classification": "text-classification"}
"""What the hub calls each task."""
_LOSSES = {
    "masked_language_model": ("kd_weight", "ce_weight"),
    "embedding": ("embedding_weight",),
    "classification": ("kd_weight", "ce_weight"),
}
"""Weights that each task has beside hidden_weight."""
_ABOUT = {
    "masked_language_model": "Its masked-token predictions are drawn to the teacher's.",
    "embedding": "Its sentence embedding is the mean of its outputs over a text's tokens.",
    "classification": "Its classes are the teacher's.",
}


def encoder_card(lineage: Lineage, facts: dict[str, Any]) -> str:
    """Return the card, as `model_card` does for a language model.

    Args:
        facts: of the stage's manifest: `eval`, `counts`, `num_parameters`, `layers`.
    """
    size, task = facts["num_parameters"], lineage.distill["task"]
    counts = facts["counts"]
    sections = [
        f"# A student of {public_name(lineage.teacher)}",
        f"An encoder of {size['student'] / 1e6:.1f} M parameters that was taught by one of {size['teacher'] / 1e6:.1f} M "
        f"({size['student'] / size['teacher']:.0%} of its size) by knowledge distillation. {_ABOUT[task]}",
        "## Model",
        *model_lines(lineage, facts),
        "## Data",
        _data(lineage.data),
        "## Training",
        loss_table(lineage.distill, (*_LOSSES[task], "hidden_weight")),
        f"Trained: every weight; {counts['steps']} steps over {counts['tokens']} tokens; "
        f"learning rate {lineage.distill['learning_rate']:g}.",
        "## What was retained",
        *_retained(facts["eval"]),
        share_of(size),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in lineage.versions.items()),
    ]
    return f"{front_matter(lineage)}\n" + "\n\n".join(sections) + "\n"


def _data(counts: dict[str, Any]) -> str:
    sources = f"{counts['documents']} documents ({counts['chunks']} chunks), {counts['pairs']} question/answer pairs"
    return (
        f"{sources} and {counts['texts']} texts: {counts['train_rows']} packed rows of {counts['train_tokens']} tokens; "
        f"{counts['eval_rows']} rows held out."
    )


def _retained(found: dict[str, float]) -> list[str]:
    rows = [
        table_row(words, found.get(f"{name}_before"), found[f"{name}_after"], found.get(f"{name}_teacher_after"))
        for name, words in TERMS.items()
        if f"{name}_after" in found
    ]
    head = ["| on held-out rows | before | student | teacher |", "|---|---|---|---|"]
    return ["\n".join([*head, *rows])] if rows else ["No rows were held out, so nothing was measured."]
