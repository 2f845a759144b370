"""From a TOML file and `--section.field value` overrides to a Config, or one clear line."""

import difflib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ray_jobs.core.config import Config
from ray_jobs.core.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Return the config of a TOML file with `["--section.field", "value", ...]` applied over it.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (the nearest is named), a wrong type or value.
    """
    tree = _read_toml(Path(path))
    for key, value in _pairs(overrides or []):
        _set(tree, key, value)
    return validate(tree)


def validate(tree: dict[str, Any]) -> Config:
    """Return the Config of nested dicts.

    Raises:
        ConfigError: the first thing that is wrong, with the value seen and what is allowed.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_line(error)) from None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"section.field": value} of nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_toml(config: Config) -> str:
    """Return a config as TOML text that `load_config` reads back equal."""
    return "\n\n".join(_tables(config.model_dump(mode="json", exclude_none=True), "")) + "\n"


def _tables(tree: dict[str, Any], name: str) -> Iterator[str]:
    lines = [f"{key} = {_literal(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    if lines:
        yield "\n".join([f"[{name}]", *lines])
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _tables(value, f"{name}.{key}".lstrip("."))


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON but for this sign is TOML


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read ({error.strerror}): give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} is not TOML: {error}") from None


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs = []
    rest = iter(words)
    for word in rest:
        key, equals, text = word.partition("=")
        if not key.startswith("--") or "." not in key:
            raise ConfigError(f"argument {word!r} is not understood: write --section.field value, like --finetune.lora.rank 32")
        value = text if equals else next(rest, None)
        if value is None:
            raise ConfigError(f"override {key} has no value: write {key} VALUE")
        pairs.append((key[2:], value))
    return pairs


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    *sections, field = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override --{key}: {section!r} is a value, not a section")
    tree[field] = _value(text)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _first_line(error: ValidationError) -> str:
    first = min(error.errors(), key=lambda one: (one["type"] != "extra_forbidden", -len(one["loc"])))  # a typo, then the deepest
    where = ".".join(str(part) for part in first["loc"] if not _is_union_tag(part))
    if first["type"] == "extra_forbidden":
        return _unknown_key(first["loc"])
    if first["type"] == "missing":
        return f"config key {where!r} is missing: add it ({_doc(first['loc'])})"
    seen = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return f"config key {where!r}{seen}: {first['msg'].removeprefix('Value error, ')} ({_doc(first['loc'])})"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "float", "bool", "constrained-int"})


def _unknown_key(location: tuple[int | str, ...]) -> str:
    *parents, key = location
    known = list(_model_at(parents).model_fields)
    nearest = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"unknown config key {'.'.join(map(str, location))!r}: {hint}"


def _model_at(location: list[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    parts = iter(location)
    for part in parts:
        annotation = model.model_fields[str(part)].annotation
        if get_origin(annotation) is dict:
            next(parts, None)  # the table's own name
        options = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = options[0]
    return model


def _doc(location: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = Config
    doc = "see the config reference"
    for part in location:
        if part not in model.model_fields:
            break
        field = model.model_fields[str(part)]
        doc = field.description or (field.annotation.__doc__ if isinstance(field.annotation, type) else None) or doc
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return doc.splitlines()[0].rstrip(".")
