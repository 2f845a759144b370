"""The exported student's README.md: teacher, data, losses, layers, training, and what was retained; nothing of the machine."""

import json
import math
from typing import Any, NamedTuple

_LOSSES = {"kd_weight": "{divergence} at temperature {kd_temperature:g}", "ce_weight": "cross-entropy on the labels"}
_LOSSES |= {"hidden_weight": "{hidden_loss} on hidden states ({hidden_layers})", "embedding_weight": "sentence embeddings"}
_SHOWN = 8
_STORED = {"full": "every weight", "lora": "LoRA adapters, merged", "qlora": "LoRA adapters on a quantized base, merged"}


class Lineage(NamedTuple):
    """What made the student, as the config and the manifests of its run say it."""

    teacher: str
    """Name of the base, as in the config."""
    taught: str | None
    """How the teacher was fine-tuned: full, lora or qlora; none where it was not."""
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
    writer = _writer(lineage)
    sections = [
        f"# A student of {writer or public_name(lineage.teacher)}",
        _what_it_is(facts["num_parameters"], writer),
        "## Model",
        *([f"- Teacher: {writer}, by the answers it wrote"] if writer else []),
        *model_lines(lineage, facts),
        "## Data",
        _data(lineage),
        "## Training",
        *_training(lineage.distill, facts),
        "## What was retained",
        *_retained(facts),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in lineage.versions.items()),
    ]
    return f"{front_matter(lineage)}\n" + "\n\n".join(sections) + "\n"


def _writer(lineage: Lineage) -> str | None:
    """Return who wrote what the student learned from, where that is not the teacher of the run."""
    if lineage.distill["targets"] != "text" or lineage.distill["text"]["model"] == "teacher":
        return None
    return public_name(lineage.distill["text"]["model"])


def _what_it_is(size: dict[str, int], writer: str | None) -> str:
    own = f"A language model of {size['student'] / 1e6:.1f} M parameters that was taught by"
    if writer:
        return f"{own} the answers of {writer} (sequence-level knowledge distillation)."
    return f"{own} one of {size['teacher'] / 1e6:.1f} M ({size['student'] / size['teacher']:.0%} of its size) by knowledge distillation."


def public_name(model: str) -> str:
    """Return a model's name without the folders of this machine or the address of a store: of a path, its last part."""
    is_place = "://" in model or model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".gguf")
    return model.rstrip("/").rpartition("/")[2] if is_place else model


def front_matter(lineage: Lineage) -> str:
    """Return what the hub reads."""
    base = public_name(lineage.own_model or lineage.teacher)
    lines = ["library_name: transformers", f"pipeline_tag: {lineage.pipeline_tag}", "tags:", "- knowledge-distillation"]
    if base.count("/") == 1:  # the hub resolves it
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---", ""])


def model_lines(lineage: Lineage, facts: dict[str, Any]) -> list[str]:
    """Return who taught, and what the student was made from."""
    taught = {"full": "every weight trained", "lora": "with a LoRA adapter", "qlora": "with an adapter trained on quantized weights"}
    role = "Teacher of the run (wrote none of the answers)" if _writer(lineage) else "Teacher"
    tuned = f"fine-tuned on the data below ({taught[lineage.taught]})" if lineage.taught else "as it is"
    teacher = f"- {role}: {public_name(lineage.teacher)}, {tuned}"
    several = facts.get("teachers", {})
    lines = [teacher + (_taught(several["teacher"]) if several else "")]
    lines += [f"- Teacher {name}: {public_name(each['model'])}{_taught(each)}" for name, each in several.items() if name != "teacher"]
    if lineage.own_model:
        return ["\n".join([*lines, f"- Student: {public_name(lineage.own_model)}, from its own weights"])]
    kept = ", ".join(str(index) for index in facts["layers"])
    weights = "the teacher's weights" if lineage.start == "teacher" else "random weights"
    return ["\n".join([*lines, f"- Student: layers {kept} of the teacher (counted from 0), from {weights}"])]


def _taught(teacher: dict[str, Any]) -> str:
    """Return what one of several teachers taught: the names of the files alone, of which a few stand for many."""
    names = sorted({name.rpartition("/")[2] for name in teacher["sources"]})
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"; taught {shown}, with weight {teacher['weight']:g}"


def _data(lineage: Lineage) -> str:
    counts = lineage.data
    sources = f"{counts['documents']} documents ({counts['chunks']} chunks) and {counts['pairs']} question/answer pairs"
    if lineage.distill["targets"] == "text":
        writer = _writer(lineage) or "the teacher"
        sources = f"{counts['answers']} answers by {writer} to the questions of {sources}, {counts['failed']} of them not trained on"
    return f"{sources}: {counts['train_rows']} packed rows of {counts['train_tokens']} tokens; {counts['eval_rows']} rows held out."


def _training(distill: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    counts = facts["counts"]
    trained = (
        f"{_STORED[distill['method']]}; {counts['steps']} steps over {counts['tokens']} tokens; learning rate {distill['learning_rate']:g}"
    )
    share = distill["on_policy"]["share"]
    own = [f"In {share:.0%} of the steps the answers were the student's own, without cross-entropy."] if share else []
    return [loss_table(distill, tuple(_LOSSES)), f"Trained: {trained}.", *own]


def loss_table(distill: dict[str, Any], weights: tuple[str, ...]) -> str:
    """Return the losses that have a weight.

    Args:
        distill: fields of [distill].
        weights: those of them that the task has.
    """
    named = {**distill, "divergence": "uld" if distill["vocabulary"] == "uld" else distill["divergence"]}
    losses = [f"| {_LOSSES[weight].format(**named)} | {distill[weight]:g} |" for weight in weights if distill[weight]]
    return "\n".join(["| loss | weight |", "|---|---|", *losses])


def _retained(facts: dict[str, Any]) -> list[str]:
    losses, share = facts["eval"], share_of(facts["num_parameters"])
    if losses.get("ce_after_nats") is None:
        return ["No rows were held out, so nothing was measured.", share]
    rows = [
        table_row("cross-entropy, nats a token", losses.get("ce_before_nats"), losses["ce_after_nats"], losses.get("ce_teacher_nats")),
        table_row("perplexity", *(_perplexity(losses.get(key)) for key in ("ce_before_nats", "ce_after_nats", "ce_teacher_nats"))),
    ]
    if losses.get("kl_after_nats") is not None:
        several = facts.get("teachers", {})
        each = [(f"KL to teacher {name}, on what it taught", one) for name, one in several.items() if one["kl_after_nats"] is not None]
        whole = "KL to the teachers by their shares" if several else "KL to the teacher"
        found = [(f"{whole}, nats a token", losses), *each]
        rows = [*(table_row(what, one.get("kl_before_nats"), one["kl_after_nats"], 0.0) for what, one in found), *rows]
    head = ["| on held-out rows | before | student | teacher |", "|---|---|---|---|"]
    return ["\n".join([*head, *rows]), share]


def share_of(size: dict[str, int]) -> str:
    """Return the student's parameters beside the teacher's."""
    return f"Parameters: {size['student']} of {size['teacher']} ({size['student'] / size['teacher']:.1%})."


def table_row(what: str, *values: float | None) -> str:
    """Return a measure with its values as a row of Markdown."""
    return f"| {what} | " + " | ".join("-" if value is None else f"{value:.4g}" for value in values) + " |"


def _perplexity(nats: float | None) -> float | None:
    return None if nats is None else math.exp(nats)
