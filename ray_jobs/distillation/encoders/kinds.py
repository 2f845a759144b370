"""What a model is by its config.json, and the distillation task that fits it."""

import json
from typing import Any

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.models import resolve_model

ENCODER_TASKS = ("masked_language_model", "embedding", "classification")
_HEADS = {"ForMaskedLM": "masked_language_model", "ForPreTraining": "masked_language_model", "ForSequenceClassification": "classification"}


def is_encoder(settings: dict[str, Any]) -> bool:
    """Return whether a model reads its text in both directions.

    Args:
        settings: fields of config.json.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return (
        settings.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not settings.get("is_decoder", False)
        and not settings.get("is_encoder_decoder", False)
    )


def natural_task(settings: dict[str, Any]) -> str:
    """Return the task for what a model was saved as: an encoder without a head gives embeddings."""
    if not is_encoder(settings):
        return "language_model"
    saved_as = _saved_as(settings)
    return next((task for ending, task in _HEADS.items() if saved_as.endswith(ending)), "embedding")


def check_task(task: str, settings: dict[str, Any], *, field: str, name: str) -> None:
    """Refuse a model that cannot do a task, by its config alone; any encoder gives embeddings.

    Args:
        task: as [distill] names it.
        settings: fields of config.json.
        field: the config field that names the model.
        name: the model's name there.

    Raises:
        ConfigError: names the task that fits the model.
    """
    fitting = natural_task(settings)
    if task == fitting or (task == "embedding" and fitting in ENCODER_TASKS):
        return
    kind = "a decoder" if fitting == "language_model" else "an encoder"
    saved_as = _saved_as(settings) or f"model_type {settings.get('model_type')!r}"
    lacks = {
        "masked_language_model": ", which has no masked-token head",
        "classification": ", which has no classification head",
        "language_model": ", which predicts no next token",
        "embedding": "",
    }[task]
    raise ConfigError(f'distill.task = "{task}", but {field} = {name!r} is {kind} ({saved_as}){lacks}: set distill.task = "{fitting}"')


def check_teacher(name: str, task: str) -> None:
    """Refuse a teacher that cannot do `distill.task`, by its config alone.

    Raises:
        ConfigError: names the task that fits it.
        ModelError: there is no model under that name.
    """
    check_task(task, json.loads((resolve_model(name) / "config.json").read_text(encoding="utf-8")), field="teacher.model", name=name)


def _saved_as(settings: dict[str, Any]) -> str:
    return (settings.get("architectures") or [""])[0]
