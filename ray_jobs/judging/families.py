"""Is a judge of one family with a model it judges? Told by the models' names alone.

Judges are said to prefer texts of their own kind (arXiv:2404.13076). A family is what one maker trains on one line of data:
Gemma is "built from the research and technology used to create Gemini models" (arXiv:2403.08295), so the two are one.
"""

import re
from collections.abc import Iterable

FAMILIES = {
    "claude": ("claude",),
    "deepseek": ("deepseek",),
    "gemini": ("gemini", "gemma", "codegemma", "medgemma"),
    "gpt": ("gpt", "chatgpt", "davinci"),
    "llama": ("llama", "codellama", "alpaca", "vicuna"),
    "mistral": ("mistral", "mixtral", "ministral", "magistral", "codestral", "devstral", "pixtral", "zephyr"),
    "phi": ("phi",),
    "qwen": ("qwen", "qwq", "qvq"),
    "smollm": ("smollm", "smolvlm"),
    "yi": ("yi",),
}
"""Names that a word of a model's name may be, wherever in it the word stands; models of other names are kin by their first word."""
NAMELESS = {"", "adapter", "base", "checkpoint", "final", "merged", "model", "snapshot", "student", "teacher"}
"""First words that name a folder, not a model."""
_FIRST_WORD = re.compile(r"[a-z]{3,}")
_CACHED = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+/?$")
_O_SERIES = re.compile(r"o\d+(?![a-z0-9.])")
_OTHERS_GPT = re.compile(r"gpt-(?:j|neox?)(?![a-z])|gpt4all")
"""Open models that bear the name of the architecture, made by others."""


def are_kin(one: str, other: str) -> bool:
    """Return whether two models are the same or of one family: openai/gpt-4.1 and o3-mini are, a name that says nothing has none.

    Args:
        one: a hub id, a folder, a file, or the name an endpoint knows; "" is nobody.
        other: as `one`.
    """
    return bool(one) and (one == other or bool(families(one) & families(other)))


def kin_of(judge: str, makers: Iterable[str]) -> list[str]:
    """Return those of the makers that a judge is kin to, each once."""
    return list(dict.fromkeys(maker for maker in makers if are_kin(judge, maker)))


def families(model: str) -> frozenset[str]:
    """Return the families of a model; DeepSeek-R1-Distill-Qwen-7B has two, ./teacher none."""
    cached = _CACHED.search(model)
    name = (cached[1] if cached else model.rstrip("/").rpartition("/")[2]).lower()
    if _OTHERS_GPT.search(name):
        return frozenset({"".join(_OTHERS_GPT.findall(name)[:1])})
    words = re.findall(r"[a-z]+", name)
    found = {family for family, names in FAMILIES.items() if set(names) & set(words)}
    if _O_SERIES.match(name):
        found.add("gpt")
    first = _FIRST_WORD.match(name)
    return frozenset(found or {first[0] if first else ""} - NAMELESS)
