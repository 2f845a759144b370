"""SIGTERM is an interrupt, and Ray Train's way to end on one is undone."""

import signal
import sys

import pytest

from ray_jobs.core.interrupts import interrupts_of_ray_train, terminate_as_interrupt


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_interrupts():
    terminate_as_interrupt()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_who_handles_interrupts_handles_sigterm_too():
    seen = []
    terminate_as_interrupt()
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGINT]


def test_an_exit_with_success_is_told_as_the_interrupt_it_was_and_its_handler_goes():
    with pytest.raises(KeyboardInterrupt), interrupts_of_ray_train():
        signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))  # as TorchTrainer.fit does
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
