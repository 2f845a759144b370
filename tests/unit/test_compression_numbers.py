"""Int8 arithmetic, held-out quality, parity bound and the bench's statistics, against independent references."""

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from ray_jobs.compression.bench import Candidate, folder_bytes, measure
from ray_jobs.compression.parity import BOUNDS, check_parity
from ray_jobs.compression.quality import Segment, log_probabilities, score, split_rows
from ray_jobs.compression.runtimes import Generation
from ray_jobs.compression.torch_int8 import Int8Linear, quantize_rows
from ray_jobs.core.errors import ModelError

VOCABULARY = 7


class FakeRuntime:
    """Logits from a seed; `seconds` for the first token and for each further one."""

    def __init__(self, seed=0, seconds=0.0, noise=0.0):
        self.seed, self.seconds, self.noise = seed, seconds, noise
        self.prompts = []

    def generate(self, prompt_ids, num_new_tokens):
        self.prompts.append((prompt_ids, num_new_tokens))
        time.sleep(self.seconds * num_new_tokens)
        return Generation([0] * num_new_tokens, self.seconds, self.seconds * num_new_tokens)

    def logits(self, input_ids):
        generator = np.random.default_rng([self.seed, *input_ids])
        clean = generator.normal(size=(len(input_ids), VOCABULARY)).astype(np.float32)
        return clean + self.noise * generator.normal(size=clean.shape).astype(np.float32)


SEGMENTS = [Segment([1, 2, 3, 4], [-100, -100, 3, 4]), Segment([5, 6, 0], [-100, 6, 0])]


def test_rows_quantize_like_torchs_own_per_channel_fake_quantizer():
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 0.1, 1, 10, 100])[:, None]
    values, scales = quantize_rows(weight)
    expected = torch.fake_quantize_per_channel_affine(weight, scales[:, 0], torch.zeros(5, dtype=torch.int32), 0, -128, 127)
    assert torch.allclose(values * scales, expected, rtol=1e-6, atol=0)
    assert values.abs().amax(dim=1).tolist() == [127] * 5
    assert ((values * scales - weight).abs() <= scales / 2 + 1e-9).all()


def test_a_row_of_zeros_stays_zero():
    values, scales = quantize_rows(torch.zeros(2, 4))
    assert torch.equal(values * scales, torch.zeros(2, 4))


@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_linear_is_close_to_the_float_layer_and_exact_on_the_grid(has_bias):
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(64, 32, bias=has_bias)
    layer.weight.data = torch.randint(-127, 128, (32, 64), generator=generator).float()
    layer.weight.data[:, 0] = 127  # every row's scale is 1, so weights lie on the grid
    x = torch.randint(-127, 128, (2, 3, 64), generator=generator).float()
    x[..., 0] = 127
    int8 = Int8Linear(64, 32, has_bias=has_bias)
    int8.weight, int8.scales = quantize_rows(layer.weight.detach())
    int8.bias = layer.bias.detach() if has_bias else None
    assert torch.allclose(int8(x), layer(x), rtol=1e-5, atol=1e-2)


def test_an_outlier_token_does_not_cost_the_others_their_precision():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    int8 = Int8Linear(64, 8, has_bias=False)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    int8.weight, int8.scales = quantize_rows(weight)
    alone = int8(x)
    x[0] *= 1000
    assert torch.equal(int8(x)[1:], alone[1:])


def test_loss_and_kl_are_those_of_torch():
    model, reference = FakeRuntime(seed=1), FakeRuntime(seed=2)
    log_p, log_q, labels = [], [], []
    for segment in SEGMENTS:
        counted = [t for t in range(len(segment.labels) - 1) if segment.labels[t + 1] >= 0]
        log_q.append(torch.tensor(model.logits(segment.input_ids))[counted].log_softmax(-1))
        log_p.append(torch.tensor(reference.logits(segment.input_ids))[counted].log_softmax(-1))
        labels += [segment.labels[t + 1] for t in counted]
    quality = score((log_probabilities(model, segment) for segment in SEGMENTS), SEGMENTS, log_p)
    assert quality.num_tokens == len(labels) == 4
    assert quality.loss_nats == pytest.approx(nn.functional.nll_loss(torch.cat(log_q), torch.tensor(labels)).item(), rel=1e-6)
    kl = nn.functional.kl_div(torch.cat(log_q), torch.cat(log_p), log_target=True, reduction="batchmean")
    assert quality.kl_nats == pytest.approx(kl.item(), rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(quality.loss_nats))
    same = score([log_probabilities(reference, segment) for segment in SEGMENTS], SEGMENTS, log_p)
    assert (same.kl_nats, same.agreement) == (0, 1)


def test_packed_rows_come_apart_at_their_examples():
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, 4, -100, -100], "segment_lengths": [2, 2, 2]}
    assert split_rows([row]) == [Segment([1, 2], [-100, 2]), Segment([3, 4], [-100, 4])]


@pytest.mark.parametrize("precision", BOUNDS)
def test_parity_bound(precision):
    reference = np.ones((3, 4), dtype=np.float32)
    assert check_parity(reference * (1 + BOUNDS[precision] / 2), reference, precision=precision, what="x") > 0
    for wrong in (reference * (1 + 2 * BOUNDS[precision]), np.full_like(reference, np.nan)):
        with pytest.raises(ModelError, match=r"export x does not reproduce"):
            check_parity(wrong, reference, precision=precision, what="x")


def test_bench_interleaves_and_compares_with_the_reference():
    opened = []

    def candidate(name, is_variant=True, **options):
        def open_runtime():
            opened.append(name)
            return FakeRuntime(**options)

        return Candidate(name, {"size_bytes": 100 if name == "student" else 25}, open_runtime, is_variant)

    progress = []
    rows = measure(
        [
            candidate("teacher", is_variant=False, seconds=0.002),
            candidate("student", seconds=0.004),
            candidate("student-int8", seconds=0.001, noise=0.5),
        ],
        prompts=[[1, 2], [3]],
        segments=SEGMENTS,
        new_tokens=4,
        repetitions=2,
        reference="student",
        on_progress=lambda done, total, note: progress.append((done, total, note)),
    )
    assert opened == ["teacher", "student", "student-int8"] * 2
    assert progress[-1] == (5, 6, "student-int8")
    teacher, student, int8 = rows
    assert (teacher["kl_nats"], teacher["agreement"]) == (None, None)
    assert (student["kl_nats"], student["agreement"], student["speedup"], student["loss_change_nats"]) == (0, 1, 1, 0)
    assert int8["kl_nats"] > 0
    assert int8["loss_change_nats"] == pytest.approx(int8["loss_nats"] - student["loss_nats"])
    assert int8["size_share"] == 0.25
    assert int8["speedup"] == pytest.approx(4)
    assert (int8["num_answers"], int8["answer_p50_s"], int8["first_token_s"]) == (4, pytest.approx(0.004), pytest.approx(0.001))
    assert int8["tokens_per_s"] == pytest.approx(1000)


def test_folder_bytes_counts_every_file_below(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"12345")
    (tmp_path / "a" / "b" / "two").write_bytes(b"123")
    assert folder_bytes(tmp_path / "a", tmp_path / "a" / "b") == 11


def test_a_lost_task_is_one_line():
    from ray.exceptions import WorkerCrashedError

    from ray_jobs.core.tasks import lost_task

    assert str(lost_task("compress", WorkerCrashedError())).startswith("compress lost a task (WorkerCrashedError): ")
    assert "\n" not in str(lost_task("compress", RuntimeError("one\ntwo")))
    assert "no reason given" in str(lost_task("compress", RuntimeError()))


def test_a_gpu_row_is_measured_only_where_workers_get_a_gpu(tiny_config):
    from ray_jobs.compress import devices

    assert devices(tiny_config().workers) == ["cpu"]
    assert devices(tiny_config(workers__gpus=1).workers) == ["cpu", "cuda"]
