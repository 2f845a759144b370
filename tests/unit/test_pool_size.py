"""When a pool grows and shrinks, second by second."""

import pytest

from ray_jobs.distillation.pool_size import PoolSize


@pytest.fixture
def size():
    return PoolSize(1, 3, grow_after_s=5.0, shrink_after_s=30.0)


def test_it_grows_once_students_have_waited_long_enough_together(size):
    size.note_wait(3.0, now=10.0)
    assert not size.grows(1, starting=0)
    size.note_wait(2.0, now=11.0)
    assert size.grows(1, starting=0)


def test_one_actor_starts_at_a_time_and_never_more_than_the_most(size):
    size.note_wait(60.0, now=100.0)
    assert not size.grows(1, starting=1)
    assert size.grows(2, starting=0)
    assert not size.grows(3, starting=0)


def test_after_a_start_the_wait_counts_anew_and_what_lay_before_it_does_not(size):
    size.note_wait(60.0, now=100.0)
    size.note_start(now=100.0)
    assert not size.grows(1, starting=0)
    size.note_wait(60.0, now=104.0)  # 56 of the 60 seconds were before the new actor worked
    assert not size.grows(1, starting=0)
    size.note_wait(1.0, now=105.0)
    assert size.grows(1, starting=0)


def test_an_actor_ends_that_was_without_work_for_long_but_never_below_the_fewest(size):
    assert not size.shrinks(2, coldest_s=29.0)
    assert size.shrinks(2, coldest_s=30.0)
    assert not size.shrinks(1, coldest_s=1e9)


def test_a_fixed_size_does_neither():
    fixed = PoolSize(2, 2)
    fixed.note_wait(1e9, now=1e9)
    assert not fixed.grows(2, starting=0)
    assert not fixed.shrinks(2, coldest_s=1e9)
    assert fixed.grows(1, starting=0), "a lost actor is below the number that was asked for"
