"""The findings as one self-contained HTML page; every text of a model is escaped, and no other script may run."""

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ray_jobs.reporting import numbers_in_words as words

SCRIPTS = ("text.js", "report.js", "labelling.js")
"""In this order they are one script of the page."""


def render(context: Mapping[str, Any]) -> bytes:
    """Return the page.

    Style and script stand inside it; a content security policy names their hashes, so that nothing else is
    applied, run or loaded, even if an escape were forgotten.
    """
    style, script = _asset("report.css"), Markup("").join(map(_asset, SCRIPTS))
    page = _environment().get_template("report.html.jinja")
    html = page.render(context, style=style, script=script, style_hash=_hash(style), script_hash=_hash(script))
    return html.encode()


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ray_jobs.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "number": words.number,
        "percent": words.percent,
        "p_value": words.p_value,
        "size": words.size,
        "duration": words.duration,
        "signed": words.signed,
        "plain": _plain,
        "groupby_pair": _by_pair,
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def _asset(name: str) -> Markup:
    return Markup(resources.files("ray_jobs.reporting").joinpath("templates", name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or words.NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return words.NONE if value is None or value == "" else str(value)


def _by_pair(matches: list[dict[str, Any]]) -> list[tuple[tuple[str, str], list[dict[str, Any]]]]:
    return [(pair, list(group)) for pair, group in groupby(matches, lambda match: (match["model_1"], match["model_2"]))]
