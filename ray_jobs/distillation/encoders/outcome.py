"""What became of an encoder's distillation: facts for the manifest, and a line for people."""

from pathlib import Path
from typing import Any

TERMS = {
    "kl": "KL to the teacher",
    "ce": "cross-entropy",
    "hidden": "hidden-state loss",
    "embedding": "1 - cosine to the teacher's embedding",
    "agreement": "same class as the teacher",
}
"""What evaluations measure, in words; each a mean over the positions that count."""


def encoder_facts(result: dict[str, Any], *, teacher: Path, student: Path) -> dict[str, Any]:
    """Return what the manifest holds beside the plan; `eval` has each term before and after, as TERM_before and TERM_after.

    Args:
        result: what the workers left.
        teacher: its folder.
        student: the exported folder.
    """
    before, after = ((result[key] or {}).get("terms", {}) for key in ("eval_before", "eval_after"))
    found = {f"{name}_{when}": terms[name] for when, terms in (("before", before), ("after", after)) for name in terms}
    return {
        "counts": {"steps": result["steps"], "tokens": result["tokens"]},
        "num_parameters": {"teacher": stored_numbers(teacher), "student": stored_numbers(student)},
        "eval": found,
        **{key: result[key] for key in ("train_seconds", "peak_bytes", "gpu_peak_bytes", "memory")},
    }


def encoder_headline(facts: dict[str, Any]) -> list[str]:
    """Return the stage's result, with its `memory_plan`, as lines for people."""
    found, size = facts["eval"], facts["num_parameters"]
    shown = [
        f"{words} {found[f'{name}_before']:.3f} -> {found[f'{name}_after']:.3f}"
        for name, words in TERMS.items()
        if f"{name}_after" in found
    ]
    rate = facts["counts"]["tokens"] / max(facts["train_seconds"], 1e-9)
    return [
        f"distill: {', '.join(shown) or 'no held-out rows'}, {size['student'] / 1e6:.1f} M of {size['teacher'] / 1e6:.1f} M parameters "
        f"({size['student'] / size['teacher']:.0%}), {facts['counts']['steps']} steps, {rate:.0f} tokens/s, "
        f"peak {max(facts['peak_bytes']) / 2**30:.2f} GiB a worker",
        *filter(None, [facts["memory_plan"].get("line")]),
    ]


def stored_numbers(folder: Path) -> int:
    """Return the numbers in a folder's safetensors, read from their headers alone."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                count = 1
                for size in opened.get_slice(name).get_shape():
                    count *= size
                total += count
    return total
