"""One contestant of the head benchmark: does a repetition for each line on stdin and prints its figures as JSON.

Runs in raystill's environment or in that of the peers, which need no part of raystill.
Shapes: N positions, H width (student and teacher differ), V vocabulary.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.turns import forget_peak, memory, versions

CHUNK_POSITIONS = 256
"""Positions of one chunk where a contestant asks for a number and has none of its own."""


class Inputs(NamedTuple):
    """The same tensors for every contestant, drawn by the seed; labels are -100 where a position does not count."""

    student_NH: Tensor
    student_head_VH: Tensor
    teacher_NH: Tensor
    teacher_head_VH: Tensor
    labels_N: Tensor
    num_valid: int
    beta: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print on import
    torch.set_num_threads(settings["threads"])
    inputs = draw_inputs(settings)
    loss_of = SYSTEMS[settings["system"]](inputs, settings["device"])
    meter = Meter(inputs.student_NH.device)
    print(json.dumps({"versions": versions()}), file=answers, flush=True)
    for _ in sys.stdin:
        found = repetition(loss_of, inputs, meter, calls=settings["calls"])
        if settings["system"] == "bare":
            found["matrix_flops"] = matrix_flops(inputs.student_NH)
        print(json.dumps(found), file=answers, flush=True)


def draw_inputs(settings: dict[str, Any]) -> Inputs:
    """Return the inputs of a cell; the last `valid_share` of the positions count, as an answer after its prompt does."""
    torch.manual_seed(0)
    positions, vocabulary = settings["positions"], settings["vocabulary"]
    student_NH, teacher_NH = (torch.randn(positions, settings[width]) for width in ("student_width", "teacher_width"))
    heads = [torch.randn(vocabulary, settings[width]).mul_(0.05) for width in ("student_width", "teacher_width")]
    labels_N = torch.randint(vocabulary, (positions,))
    num_valid = round(positions * settings["valid_share"])
    labels_N[: positions - num_valid] = -100
    place = {"device": settings["device"], "dtype": getattr(torch, settings["dtype"])}
    student_NH, student_VH, teacher_NH, teacher_VH = (tensor.to(**place) for tensor in (student_NH, heads[0], teacher_NH, heads[1]))
    student_NH.requires_grad_()
    student_VH.requires_grad_(settings["trained_head"])
    return Inputs(student_NH, student_VH, teacher_NH, teacher_VH, labels_N.to(settings["device"]), num_valid, settings["beta"])


class Meter:
    """Peak memory above what is in use at its making, in bytes: of the process, or of the device's allocator."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            forget_peak()
            self._before = memory("VmRSS")["VmRSS"]

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.on_gpu else memory("VmHWM")["VmHWM"]) - self._before

    def clocks(self) -> tuple[float, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()


def repetition(loss_of: Callable[[], Tensor | None], inputs: Inputs, meter: Meter, *, calls: int) -> dict[str, Any]:
    """Return the seconds of one loss with its gradient, the mean of so many calls, and what they gave."""
    trained = [tensor for tensor in (inputs.student_NH, inputs.student_head_VH) if tensor.requires_grad]
    if meter.on_gpu:
        forward_backward(loss_of, trained)  # the allocator's cache was given back to the other contestants
    (cpu, wall), loss = meter.clocks(), None
    for _ in range(calls):
        loss = forward_backward(loss_of, trained)
    end_cpu, end_wall = meter.clocks()
    figures = {"cpu_s": (end_cpu - cpu) / calls, "wall_s": (end_wall - wall) / calls, "peak_bytes": meter.peak()}
    if loss is not None:
        norms = [float(tensor.grad.norm(dtype=torch.float32)) for tensor in trained]
        figures |= {"loss": float(loss), "grad_norm": sum(norm**2 for norm in norms) ** 0.5}
    for tensor in trained:
        tensor.grad = None
    if meter.on_gpu:
        torch.cuda.empty_cache()
    return figures


def forward_backward(loss_of: Callable[[], Tensor | None], trained: list[Tensor]) -> Tensor | None:
    for tensor in trained:
        tensor.grad = None
    loss = loss_of()
    if loss is not None:
        loss.backward()
        loss = loss.detach()
    return loss


def raystill(inputs: Inputs, _: str) -> Callable[[], Tensor]:
    from ray_jobs.distillation.divergence import Divergence, fused_head_loss

    divergence = Divergence("jsd", beta=inputs.beta) if inputs.beta else Divergence("forward_kl")

    def loss() -> Tensor:
        valid_N = inputs.labels_N != -100
        hidden = inputs.student_NH[valid_N], inputs.student_head_VH, inputs.teacher_NH[valid_N], inputs.teacher_head_VH
        loss = fused_head_loss(*hidden, inputs.labels_N[valid_N], divergence=divergence, kd_weight=1.0, ce_weight=0.0)
        return loss.total / inputs.num_valid

    return loss


def trl_dense(inputs: Inputs, _: str) -> Callable[[], Tensor]:
    from trl.experimental.gkd import GKDTrainer

    def loss() -> Tensor:
        student_NV = inputs.student_NH @ inputs.student_head_VH.T
        with torch.no_grad():
            teacher_NV = inputs.teacher_NH @ inputs.teacher_head_VH.T
        options = {"labels": inputs.labels_N, "beta": inputs.beta, "num_items_in_batch": inputs.num_valid}
        return GKDTrainer.generalized_jsd_loss(student_NV, teacher_NV, **options)

    return loss


def trl_chunked(inputs: Inputs, _: str, *, positions: int | None = None) -> Callable[[], Tensor]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    at = slice(None) if positions is None else slice(len(inputs.labels_N) - positions, None)

    def loss() -> Tensor:
        student_1NH, teacher_1NH, labels_1N = (part[None, at] for part in (inputs.student_NH, inputs.teacher_NH, inputs.labels_N))
        heads = inputs.student_head_VH, inputs.teacher_head_VH
        return _chunked_divergence_loss(student_1NH, teacher_1NH, *heads, labels_1N != -100, inputs.beta)[0]

    return loss


def trl_chunked_slice(inputs: Inputs, device: str) -> Callable[[], Tensor]:
    return trl_chunked(inputs, device, positions=inputs.num_valid)


def liger_chunked(inputs: Inputs, device: str) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {"compiled": True} if device == "cuda" else {"compiled": False, "chunk_size": CHUNK_POSITIONS}
    head = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=inputs.beta, **options)
    return lambda: head(*inputs[:5])


def liger_triton(inputs: Inputs, _: str) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearJSD

    head = LigerFusedLinearJSD(jsd_beta=inputs.beta)
    return lambda: head(*inputs[:5])


def torchtune_chunked(inputs: Inputs, _: str) -> Callable[[], Tensor]:
    # the package does not import without torchao, the file of its losses does
    package = importlib.util.find_spec("torchtune")
    if package is None:
        raise ModuleNotFoundError("torchtune is not installed in the peers' environment: pip install --no-deps torchtune")
    file = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("kd_losses", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    head = module.ForwardKLWithChunkedOutputLoss()

    def loss() -> Tensor:
        parts = head.num_output_chunks
        student = [chunk @ inputs.student_head_VH.T for chunk in inputs.student_NH[None].chunk(parts, dim=1)]
        with torch.no_grad():
            teacher = [chunk @ inputs.teacher_head_VH.T for chunk in inputs.teacher_NH[None].chunk(parts, dim=1)]
        return head(student, teacher, inputs.labels_N[None])

    return loss


def bare(inputs: Inputs, _: str) -> Callable[[], None]:
    """The matrix products that no head can do without, on valid positions alone: no softmax, no loss."""
    valid_N = inputs.labels_N != -100
    student_VH, teacher_VH = inputs.student_head_VH.detach(), inputs.teacher_head_VH
    grad_VH = torch.zeros_like(student_VH) if inputs.student_head_VH.requires_grad else None

    def products() -> None:
        student_NH, teacher_NH = inputs.student_NH.detach()[valid_N], inputs.teacher_NH[valid_N]
        for student_CH, teacher_CH in zip(student_NH.split(CHUNK_POSITIONS), teacher_NH.split(CHUNK_POSITIONS), strict=True):
            student_CV = student_CH @ student_VH.T
            teacher_CH @ teacher_VH.T
            student_CV @ student_VH
            if grad_VH is not None:
                grad_VH.addmm_(student_CV.T, student_CH)

    return products


def matrix_flops(like: Tensor) -> float:
    """Return the operations a second of a large square matrix product in the inputs' type: what the device can do."""
    side, meter = 8192 if like.is_cuda else 2048, Meter(like.device)
    square = torch.randn(side, side, device=like.device, dtype=like.dtype)
    rates = []
    for _ in range(3):
        cpu, wall = meter.clocks()
        square @ square
        end_cpu, end_wall = meter.clocks()
        rates.append(2 * side**3 / (end_wall - wall if meter.on_gpu else end_cpu - cpu))
    return max(rates)


SYSTEMS = {
    "raystill": raystill,
    "trl-dense": trl_dense,
    "trl-chunked": trl_chunked,
    "trl-chunked-slice": trl_chunked_slice,
    "liger-chunked": liger_chunked,
    "liger-triton": liger_triton,
    "torchtune": torchtune_chunked,
    "bare": bare,
}

if __name__ == "__main__":
    main()
