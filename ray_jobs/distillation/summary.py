"""What a distillation came to: the facts of its manifest, and the line that people read."""

from typing import Any

from ray_jobs.distillation.target_words import targets_in_words, told


def facts_of(
    result: dict[str, Any], *, num_parameters: dict[str, int], teachers: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return what the manifest says of a training run.

    Args:
        result: as `fit` returns it.
        num_parameters: of the `teacher` and of the `student` as it is exported.
        teachers: model, sources and weight of each by name, where there are several.
    """
    counts = dict(result["loss_counts"])
    own = {name: counts.pop(name) for name in ("on_policy_tokens", "generate_s") if name in counts}
    before, after = ((result[key] or {}).get("terms", {}) for key in ("eval_before", "eval_after"))
    return {
        "counts": {"steps": result["steps"], "tokens": result["tokens"]},
        "num_parameters": num_parameters,
        "eval": {
            "kl_before_nats": before.get("kl"),
            "kl_after_nats": after.get("kl"),
            "ce_teacher_nats": after.get("ce_teacher"),
            "ce_before_nats": before.get("ce"),
            "ce_after_nats": after.get("ce"),
            **({"uld_before": before["uld"], "uld_after": after["uld"]} if "uld" in after else {}),
        },
        "train_seconds": result["train_seconds"],
        "peak_bytes": result["peak_bytes"],
        "gpu_peak_bytes": result["gpu_peak_bytes"],
        "memory": result["memory"],
        "teacher_targets": told(counts, result["loss_facts"]),
        **({"teachers": {name: each | _apart(name, before, after) for name, each in teachers.items()}} if teachers else {}),
        **({"on_policy": {"tokens": own["on_policy_tokens"], "generate_s": own["generate_s"]}} if own else {}),
    }


def _apart(name: str, before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    """Return the divergence from one of several teachers on the held-out tokens that it teaches."""
    return {"kl_before_nats": before.get(f"kl_{name}"), "kl_after_nats": after.get(f"kl_{name}")}


def headline(facts: dict[str, Any]) -> list[str]:
    """Return a run's facts, with its `memory_plan`, as lines for people."""
    losses, size = facts["eval"], facts["num_parameters"]
    shown = ["no held-out rows"]
    if losses["ce_after_nats"] is not None:
        teacher = "" if losses["ce_teacher_nats"] is None else f" (teacher {losses['ce_teacher_nats']:.3f})"
        shown = [f"held-out loss {losses['ce_before_nats']:.3f} -> {losses['ce_after_nats']:.3f}{teacher}"]
    if losses["kl_after_nats"] is not None:
        shown.insert(0, f"KL to the teacher {losses['kl_before_nats']:.3f} -> {losses['kl_after_nats']:.3f} nats")
    if "uld_after" in losses:
        shown.insert(0, f"distance to the teacher {losses['uld_before']:.3f} -> {losses['uld_after']:.3f}")
    share = size["student"] / size["teacher"]
    rate = facts["counts"]["tokens"] / max(facts["train_seconds"], 1e-9)
    return [
        f"distill: {', '.join(shown)}, {size['student'] / 1e6:.1f} M of {size['teacher'] / 1e6:.1f} M parameters ({share:.0%}), "
        f"{facts['counts']['steps']} steps, {rate:.0f} tokens/s, peak {max(facts['peak_bytes']) / 2**30:.2f} GiB a worker",
        *(
            f"teacher {name}: KL {each['kl_before_nats']:.3f} -> {each['kl_after_nats']:.3f} nats on what it teaches"
            for name, each in facts.get("teachers", {}).items()
            if each["kl_after_nats"] is not None
        ),
        *filter(None, [targets_in_words(facts["teacher_targets"]), facts["memory_plan"].get("line")]),
    ]
