"""The parts of a step's time add up, and communication is the union of what was under way."""

import time

import pytest
import torch

from ray_jobs.training.timing import PARTS, STEP, Clock, CommunicationProbe, covered, shares


def test_parts_inside_a_step_are_counted_apart_and_taken_once():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock(STEP):
            with clock("forward"):
                time.sleep(0.01)
            with clock("backward"):
                time.sleep(0.02)
    seconds = clock.take()
    assert seconds["forward"] >= 0.02 and seconds["backward"] >= 0.04
    assert seconds[STEP] >= seconds["forward"] + seconds["backward"]
    assert clock.take() == {}


def test_shares_add_up_to_one():
    found = shares({STEP: 4.0, "data": 0.4, "forward": 1.0, "backward": 2.0, "optimizer": 0.2})
    assert found == pytest.approx({"data": 0.1, "forward": 0.25, "backward": 0.5, "optimizer": 0.05, "other": 0.1})
    assert sum(found.values()) == pytest.approx(1)
    assert list(found) == [*PARTS, "other"]


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(3, 5)], 2), ([(3, 5), (4, 9)], 6), ([(10, 12), (3, 5)], 4), ([(1, 9), (2, 3)], 8), ([(1, 3), (3, 5)], 4)],
)
def test_covered_is_the_length_of_the_union(intervals, length):
    assert covered(intervals) == length


def test_one_worker_is_not_profiled():
    probe = CommunicationProbe(world_size=1, first_step=0)
    with probe(1):
        assert not torch.autograd.profiler._is_profiler_enabled
    assert probe.share == 0.0
