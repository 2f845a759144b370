"""Kept top-k targets: a distribution over K + 1 buckets at any temperature, close to the exact one, and the same from bytes."""

import math

import pytest
import torch

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.topk import TAIL_NODES, TopKCodec, make_top_k

VOCABULARY, WIDTH, POSITIONS = 500, 8, 40
TEMPERATURES = (0.5, 0.7, 0.9, 1.0, 1.25, 2.0, 2.7, 5.0, 20.0)


@pytest.fixture(scope="module")
def exact():
    """Hidden states, a head, labels, and the logits they make in float64."""
    torch.manual_seed(0)
    hidden, head = 1.5 * torch.randn(POSITIONS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    return hidden, head, torch.randint(VOCABULARY, (POSITIONS,)), hidden.double() @ head.double().T


def buckets(logits, ids, temperature):
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, ids), log_p.scatter(1, ids, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 16, VOCABULARY - 1])
def test_buckets_are_a_distribution_and_near_the_exact_one(exact, k, temperature):
    hidden, head, labels, logits = exact
    ids, log_p, log_tail = make_top_k(hidden, head, labels, k=k).at(temperature)
    torch.testing.assert_close(torch.logaddexp(log_p.logsumexp(-1), log_tail), torch.zeros(POSITIONS), atol=1e-5, rtol=0)
    kept, tail = buckets(logits, ids, temperature)
    at_node = any(math.isclose(1 / temperature, node) for node in TAIL_NODES)
    torch.testing.assert_close(log_tail.double(), tail, atol=1e-4 if at_node else 0.03, rtol=0)
    torch.testing.assert_close(log_p.double().exp(), kept.exp(), atol=1e-5 if at_node else 0.01, rtol=0)


def test_bytes_keep_ids_and_labels_exactly_and_the_rest_nearly(exact):
    hidden, head, labels, logits = exact
    target = make_top_k(hidden, head, labels, k=16)
    for vocabulary, id_bytes in ((VOCABULARY, 2), (2**16 + 1, 4)):
        codec = TopKCodec(16, vocabulary)
        data = codec.encode(target)
        assert len(data) == POSITIONS * codec.bytes_per_position
        assert codec.bytes_per_position == 16 * (2 + id_bytes) + 54
        found = codec.decode(data)
        assert torch.equal(found.token_ids_NK, target.token_ids_NK)
        assert torch.equal(found.label_log_p_N, target.label_log_p_N)
        torch.testing.assert_close(found.log_p_NK, target.log_p_NK, atol=2e-4, rtol=0)
        torch.testing.assert_close(found.at(3.0)[2], target.at(3.0)[2], atol=1e-3, rtol=0)
    torch.testing.assert_close(target.label_log_p_N.double(), logits.log_softmax(-1).gather(1, labels[:, None])[:, 0])


def test_no_positions_are_no_bytes(exact):
    _, head, _, _ = exact
    target = make_top_k(torch.zeros(0, WIDTH), head, torch.zeros(0, dtype=torch.long), k=4)
    codec = TopKCodec(4, VOCABULARY)
    assert codec.encode(target) == b""
    assert codec.decode(b"").at(1.0)[1].shape == (0, 4)


def test_a_temperature_below_the_tails_reach_is_refused(exact):
    hidden, head, labels, _ = exact
    with pytest.raises(ConfigError, match=r'kd_temperature = 0.4 is below 0.5, .* use cache.keep = "hidden"'):
        make_top_k(hidden, head, labels, k=4).at(0.4)
