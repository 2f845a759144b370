"""The config reference, made from the fields' own docstrings: `python -m ray_jobs.core.config_docs > docs/config.md`."""

import json
import sys
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ray_jobs.core.config import Config

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
HEAD = """# Config reference

A run is one TOML file; `--section.field value` overrides any field. Keys and passwords are never fields: they come
from the environment. Made by `python -m ray_jobs.core.config_docs > docs/config.md`.
"""


def config_docs() -> str:
    """Return the reference of every section and field as Markdown."""
    return "\n".join([HEAD, *_section(Config, "")])


def _section(model: type[BaseModel], name: str) -> Iterator[str]:
    below = {key: field.annotation for key, field in model.model_fields.items() if _is_section(field.annotation)}
    own = {key: field for key, field in model.model_fields.items() if key not in below}
    if own:
        doc = " ".join((model.__doc__ or "").removeprefix(f"[{name}]").split())
        yield f"## [{name}]\n\n{doc[:1].upper()}{doc[1:]}\n\n| field | default | allowed | what |\n|---|---|---|---|"
        yield from (f"| `{key}` | {_default(field)} | {_allowed(field)} | {_cell(field.description or '')} |" for key, field in own.items())
        yield ""
    for key, section in below.items():
        assert isinstance(section, type)
        yield from _section(section, f"{name}.{key}".lstrip("."))


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "none" if field.default is None else f"`{_cell(json.dumps(field.default))}`"


def _allowed(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(one, key)}" for one in field.metadata for key, sign in _BOUNDS.items() if getattr(one, key, None) is not None
    ]
    return ", ".join([_cell(_type(field.annotation)), *bounds])


def _type(annotation: object) -> str:
    """Return a type in words: its choices, "list of ...", "text", "number"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{choice}`" for choice in inner)
    if origin is dict and not _is_section(inner[1]):
        return f"table of {_type(inner[1])}"
    if origin is dict:
        return f"tables of {', '.join(f'`{name}`' for name in inner[1].model_fields)}"
    if origin in {list, tuple}:
        return f"{'list' if origin is list else 'pair'} of {_type(inner[0])}"
    if inner:
        return " or ".join(_type(part) for part in inner if isinstance(part, type) or get_args(part))
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "none"}
    return names.get(annotation, str(annotation))  # type: ignore[call-overload]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(config_docs())
