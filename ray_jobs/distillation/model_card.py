"""The exported student's README.md: teacher, data, losses, layers, training, and what was retained; nothing of the machine."""

import json
import math
from typing import Any, NamedTuple

_LOSSES = {"kd_weight": "{divergence} at temperature {kd_temperature:g}", "ce_weight": "cross-entropy on the labels"}
_LOSSES |= {"hidden_weight": "{hidden_loss} on hidden states ({hidden_layers})", "embedding_weight": "sentence embeddings"}
_STORED = {"full": "every weight", "lora": "LoRA adapters, merged", "qlora": "LoRA adapters on a quantized base, merged"}


class Lineage(NamedTuple):
    """What made the student, as the config and the manifests of its run say it."""

    teacher: str
    """Name of the base, as in the config."""
    taught: str
    """How the teacher was fine-tuned: full, lora or qlora."""
    own_model: str | None
    """The student's own model, where it was not cut from the teacher."""
    start: str
    """teacher or random."""
    data: dict[str, Any]
    """Counts of prepare's manifest."""
    distill: dict[str, Any]
    """Fields of [distill]."""
    versions: dict[str, str]
    """Packages and their versions."""
    pipeline_tag: str = "text-generation"
    """What the hub calls the task."""


def model_card(lineage: Lineage, facts: dict[str, Any]) -> str:
    """Return the card: Markdown with the YAML front matter that the hub reads.

    Args:
        facts: of the stage's manifest: `eval`, `counts`, `num_parameters`, `layers`.
    """
    size = facts["num_parameters"]
    sections = [
        f"# A student of {public_name(lineage.teacher)}",
        f"A language model of {size['student'] / 1e6:.1f} M parameters that was taught by one of {size['teacher'] / 1e6:.1f} M "
        f"({size['student'] / size['teacher']:.0%} of its size) by knowledge distillation.",
        "## Model",
        *_model(lineage, facts),
        "## Data",
        _data(lineage.data),
        "## Training",
        *_training(lineage.distill, facts),
        "## What was retained",
        *_retained(facts),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in lineage.versions.items()),
    ]
    return f"{_front_matter(lineage)}\n" + "\n\n".join(sections) + "\n"


def public_name(model: str) -> str:
    """Return a model's name without the folders of this machine or the address of a store: of a path, its last part."""
    is_place = "://" in model or model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")
    return model.rstrip("/").rpartition("/")[2] if is_place else model


def _front_matter(lineage: Lineage) -> str:
    base = public_name(lineage.own_model or lineage.teacher)
    lines = ["library_name: transformers", f"pipeline_tag: {lineage.pipeline_tag}", "tags:", "- knowledge-distillation"]
    if base.count("/") == 1:  # the hub resolves it
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---", ""])


def _model(lineage: Lineage, facts: dict[str, Any]) -> list[str]:
    taught = {"full": "every weight trained", "lora": "with a LoRA adapter", "qlora": "with an adapter trained on quantized weights"}
    teacher = f"- Teacher: {public_name(lineage.teacher)}, fine-tuned on the data below ({taught[lineage.taught]})"
    if lineage.own_model:
        return [f"{teacher}\n- Student: {public_name(lineage.own_model)}, from its own weights"]
    kept = ", ".join(str(index) for index in facts["layers"])
    weights = "the teacher's weights" if lineage.start == "teacher" else "random weights"
    return [f"{teacher}\n- Student: layers {kept} of the teacher (counted from 0), from {weights}"]


def _data(counts: dict[str, Any]) -> str:
    sources = f"{counts['documents']} documents ({counts['chunks']} chunks) and {counts['pairs']} question/answer pairs"
    return f"{sources}: {counts['train_rows']} packed rows of {counts['train_tokens']} tokens; {counts['eval_rows']} rows held out."


def _training(distill: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    named = {**distill, "divergence": "uld" if distill["vocabulary"] == "uld" else distill["divergence"]}
    losses = [f"| {what.format(**named)} | {distill[weight]:g} |" for weight, what in _LOSSES.items() if distill[weight]]
    counts = facts["counts"]
    trained = (
        f"{_STORED[distill['method']]}; {counts['steps']} steps over {counts['tokens']} tokens; learning rate {distill['learning_rate']:g}"
    )
    share = distill["on_policy"]["share"]
    own = [f"In {share:.0%} of the steps the answers were the student's own, without cross-entropy."] if share else []
    return ["\n".join(["| loss | weight |", "|---|---|", *losses]), f"Trained: {trained}.", *own]


def _retained(facts: dict[str, Any]) -> list[str]:
    losses, size = facts["eval"], facts["num_parameters"]
    share = f"Parameters: {size['student']} of {size['teacher']} ({size['student'] / size['teacher']:.1%})."
    if losses.get("ce_after_nats") is None:
        return ["No rows were held out, so nothing was measured.", share]
    rows = [
        _row("cross-entropy, nats a token", losses.get("ce_before_nats"), losses["ce_after_nats"], losses.get("ce_teacher_nats")),
        _row("perplexity", *(_perplexity(losses.get(key)) for key in ("ce_before_nats", "ce_after_nats", "ce_teacher_nats"))),
    ]
    if losses.get("kl_after_nats") is not None:
        rows.insert(0, _row("KL to the teacher, nats a token", losses.get("kl_before_nats"), losses["kl_after_nats"], 0.0))
    head = ["| on held-out rows | before | student | teacher |", "|---|---|---|---|"]
    return ["\n".join([*head, *rows]), share]


def _row(what: str, *values: float | None) -> str:
    return f"| {what} | " + " | ".join("-" if value is None else f"{value:.4g}" for value in values) + " |"


def _perplexity(nats: float | None) -> float | None:
    return None if nats is None else math.exp(nats)
