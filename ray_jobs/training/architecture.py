"""A model's config without its weights: from where the model is, or from a small table of known ones."""

import importlib.resources
import json
from pathlib import Path
from typing import Any, NamedTuple

from ray_jobs.core.errors import ModelError, StorageError
from ray_jobs.core.models import BUILT_IN, resolve_model
from ray_jobs.core.storage import Storage


class Architecture(NamedTuple):
    """What a config.json says, and who said it."""

    settings: dict[str, Any]
    """The fields of config.json."""
    source: str
    """Where they come from, in words for people."""

    @property
    def config(self) -> Any:
        """The transformers config, which knows each family's own names for its fields.

        Raises:
            ModelError: transformers does not know the model's type.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.for_model(**self.settings)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"model_type {self.settings.get('model_type')!r} is not known to transformers: {error}") from None


def find_architecture(name: str) -> Architecture:
    """Return the architecture of a model by its name in the config, loading no weights.

    Args:
        name: a built-in name, a local folder, a GGUF file, a URI of a folder, or a hub id.

    Raises:
        ModelError: there is no config.json, and the table does not know the name.
    """
    if name in BUILT_IN and name in _table():
        return Architecture(_table()[name], "built in")
    if name in BUILT_IN:
        return Architecture(_of_folder(str(resolve_model(name))), "built in")
    if name.endswith(".gguf"):
        return Architecture(_of_gguf(Path(name)), f"{name}")
    if "://" in name or Path(name).expanduser().is_dir():
        return Architecture(_of_folder(name), f"{name}/config.json")
    return _of_hub(name)


def _table() -> dict[str, dict[str, Any]]:
    return json.loads(importlib.resources.files("ray_jobs.training").joinpath("architectures.json").read_text())


def _of_folder(name: str) -> dict[str, Any]:
    try:
        return Storage(name).read_json("config.json")
    except (FileNotFoundError, StorageError, json.JSONDecodeError) as error:
        raise ModelError(f"model {name!r} has no readable config.json ({error}): give a Hugging Face model folder") from None


def _of_gguf(file: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"GGUF file {str(file)!r} cannot be read: {error}") from None


def _of_hub(name: str) -> Architecture:
    import httpx2
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    table = _table()
    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Architecture(json.loads(Path(cached).read_text()), "the hub's cache")
        if name in table:  # before the hub: without a network its client retries for half a minute
            return Architecture(table[name], "the built-in table, not the hub")
        return Architecture(json.loads(Path(hf_hub_download(name, "config.json")).read_text()), "the hub")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model {name!r} is no folder or GGUF file, and the hub did not give its config ({reason}): "
            f"give a folder with config.json, or one of {', '.join(table)}"
        ) from None
