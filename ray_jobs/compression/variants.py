"""What can be made of a model: each variant's engine and precision, how it is written, how it is opened."""

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedModel

from ray_jobs.compression.parity import check_parity
from ray_jobs.compression.runtimes import Runtime, TorchRuntime


class Variant(NamedTuple):
    """One way to store and run a model."""

    engine: str
    """Key of ENGINES."""
    precision: str
    """Key of parity.BOUNDS."""


VARIANTS = {
    "torch-int8": Variant("torch", "int8"),
    "openvino-fp32": Variant("openvino", "float32"),
    "openvino-int8": Variant("openvino", "int8"),
    "onnx-fp32": Variant("onnxruntime", "float32"),
    "onnx-int8": Variant("onnxruntime", "int8"),
}


class Source(NamedTuple):
    """The model that variants are made of."""

    folder: Path
    """Plain Hugging Face folder with its tokenizer."""
    load: Callable[[], PreTrainedModel]
    """Loads it: float32, on the CPU, eval mode, sdpa attention."""
    probe_ids: list[int]
    """A text's token ids, at least 8, on which export and model must agree."""


class Export(NamedTuple):
    """A finished folder, not yet in its place."""

    name: str
    folder: Path
    facts: dict[str, Any]
    """The relative error of its logits, and who wrote it."""


def by_engine(names: list[str]) -> dict[str, list[str]]:
    """Return the names grouped by engine: one group is exported together, as float32 and int8 share their first half."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(VARIANTS[name].engine, []).append(name)
    return groups


def export(engine: str, names: list[str], source: Source) -> Iterator[Export]:
    """Write the variants of one engine, each into a temporary folder that lives until the next one is asked for.

    Raises:
        ModelError: an exporter does not know the architecture, or an export does not say what the model says.
    """
    with tempfile.TemporaryDirectory(prefix="raystill-export-") as staging:
        for name, folder, error in ENGINES[engine].export(names, source, Path(staging)):
            yield Export(name, folder, {"relative_error": error, "engine": with_version(ENGINES[engine].package)})


def open_variant(name: str, folder: Path, *, num_threads: int) -> Runtime:
    """Return a variant's folder loaded and ready."""
    return ENGINES[VARIANTS[name].engine].open(folder, num_threads)


def with_version(package: str) -> str:
    """Return an installed package with its version, like "openvino 2026.4.1"."""
    return f"{package} {importlib.metadata.version(package)}"


_Exported = Iterator[tuple[str, Path, float]]


def _export_torch(names: list[str], source: Source, staging: Path) -> _Exported:
    from ray_jobs.compression.torch_int8 import export_torch_int8, load_torch_int8

    model, tokenizer = source.load(), AutoTokenizer.from_pretrained(source.folder)
    expected = TorchRuntime(model).logits(source.probe_ids)
    for name in names:
        export_torch_int8(model, tokenizer, staging / name)
        logits = TorchRuntime(load_torch_int8(staging / name)).logits(source.probe_ids)
        yield name, staging / name, check_parity(logits, expected, precision=VARIANTS[name].precision, what=name)


def _open_torch(folder: Path, num_threads: int) -> Runtime:
    from ray_jobs.compression.torch_int8 import load_torch_int8

    return TorchRuntime(load_torch_int8(folder))


def _export_openvino(names: list[str], source: Source, staging: Path) -> _Exported:
    from ray_jobs.compression import openvino_export
    from ray_jobs.compression.openvino_runtime import probe

    model, tokenizer = source.load(), AutoTokenizer.from_pretrained(source.folder)
    expected = TorchRuntime(model).logits(source.probe_ids)
    converted = openvino_export.convert(model)
    check_parity(probe(converted, source.probe_ids), expected, precision="float32", what="openvino")
    for name in sorted(names, key=lambda name: VARIANTS[name].precision != "float32"):  # int8 compresses in place, so it comes last
        precision = VARIANTS[name].precision
        if precision == "int8":
            openvino_export.compress_weights(converted)
        error = check_parity(probe(converted, source.probe_ids), expected, precision=precision, what=name)
        openvino_export.save(converted, model, tokenizer, staging / name)
        yield name, staging / name, error


def _open_openvino(folder: Path, num_threads: int) -> Runtime:
    from ray_jobs.compression.openvino_runtime import OpenVINORuntime

    return OpenVINORuntime(folder, num_threads=num_threads)


def _export_onnx(names: list[str], source: Source, staging: Path) -> _Exported:
    from ray_jobs.compression.onnx_export import export_onnx
    from ray_jobs.compression.onnx_runtime import ONNXRuntime

    expected = TorchRuntime(source.load()).logits(source.probe_ids)
    for name in names:
        precision = VARIANTS[name].precision
        export_onnx(source.folder, staging / name, precision=precision)
        logits = ONNXRuntime(staging / name, num_threads=1).logits(source.probe_ids)
        yield name, staging / name, check_parity(logits, expected, precision=precision, what=name)


def _open_onnx(folder: Path, num_threads: int) -> Runtime:
    from ray_jobs.compression.onnx_runtime import ONNXRuntime

    return ONNXRuntime(folder, num_threads=num_threads)


class Engine(NamedTuple):
    """How one engine writes and opens its variants; imports stay inside, so that a process loads the engines it uses."""

    package: str
    export: Callable[[list[str], Source, Path], _Exported]
    open: Callable[[Path, int], Runtime]


ENGINES = {
    "torch": Engine("torch", _export_torch, _open_torch),
    "openvino": Engine("openvino", _export_openvino, _open_openvino),
    "onnxruntime": Engine("onnxruntime-genai", _export_onnx, _open_onnx),
}
