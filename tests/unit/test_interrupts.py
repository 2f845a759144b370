"""SIGTERM is an interrupt, and Ray Train's way to end on one is undone.

Each case has a process of its own: once the CPU plugin of OpenVINO 2026 has been loaded, the main thread's alternate signal
stack, on which Python's handlers run, is unmapped, and any signal ends the process.
"""

import signal
import subprocess
import sys

import pytest

WAIT = "print('ready', flush=True); time.sleep(60)"
HEAD = """
import signal, sys, time
from threading import Event
from ray_jobs.core.interrupts import hangups_blocked, interrupt_late, interrupts_of_ray_train, terminate_as_interrupt
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what runs the tests may ignore it, as nohup does
"""


def ended(program: str, number: signal.Signals) -> tuple[int, str]:
    """How a process ends (negative: by that signal) and what it said when `number` reaches it while it waits."""
    command = [sys.executable, "-c", f"{HEAD}\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, said.strip()


def test_sigterm_interrupts():
    assert ended(f"terminate_as_interrupt(); {WAIT}", signal.SIGTERM) == (-signal.SIGINT, "")


def test_sigterm_interrupts_what_ignores_sigint_as_scripts_start_it_with_an_ampersand():
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert ended(f"{ignored}; terminate_as_interrupt(); {WAIT}", signal.SIGTERM) == (-signal.SIGINT, "")


def test_who_handles_interrupts_handles_sigterm_too():
    handler = "signal.signal(signal.SIGINT, lambda number, frame: sys.exit(int(number) + 5))"
    assert ended(f"terminate_as_interrupt(); {handler}; {WAIT}", signal.SIGTERM) == (signal.SIGINT + 5, "")


def test_an_exit_with_success_is_told_as_the_interrupt_it_was_and_its_handler_goes():
    program = f"""
try:
    with interrupts_of_ray_train():
        signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))  # as TorchTrainer.fit does
        {WAIT}
except KeyboardInterrupt:
    print("interrupted,", "restored" if signal.getsignal(signal.SIGINT) is signal.default_int_handler else "left")
"""
    assert ended(program, signal.SIGINT) == (0, "interrupted, restored")


def test_a_hangup_passes_by_what_is_started_while_it_is_blocked_and_reaches_who_started_it_after():
    program = """
import subprocess
with hangups_blocked():
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.raise_signal(signal.SIGHUP); print('passed by')"])
    signal.raise_signal(signal.SIGHUP)
    print("ready", child.wait(), flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", f"{HEAD}\n{program}"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout.splitlines()) == (-signal.SIGHUP, ["passed by", "ready 0"])


RAY = """
import signal
def is_initialized():
    return False
def init(**_):
    print("blocked" if signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, []) else "open")
    raise ConnectionError
"""


def test_ray_is_started_with_hangups_blocked_and_the_driver_goes_on_with_them_open(tmp_path):
    (tmp_path / "ray.py").write_text(RAY)  # in the place of the library: what it starts would take half a minute
    program = f"""
sys.path.insert(0, {str(tmp_path)!r})
from ray_jobs.core.cluster import ClusterError, connect
try:
    with connect():
        pass
except ClusterError:
    print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    said = subprocess.run([sys.executable, "-c", f"{HEAD}\n{program}"], stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout
    assert said.splitlines() == ["blocked", "set()"]


LATE = """
told, patience_s = Event(), {patience_s}
try:
    with interrupt_late(told.set, patience_s=patience_s):
        print("ready", flush=True)
        told.wait()
        {then}
        print("ended", end=" ")
except KeyboardInterrupt:
    print("interrupted,", "restored" if signal.getsignal(signal.SIGINT) is signal.default_int_handler else "left")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_raised_when_its_block_has_ended(number):
    assert ended(LATE.format(then="time.sleep(0.1)", patience_s=60), number) == (0, "ended interrupted, restored")


def test_the_hangups_of_one_terminal_are_one_interrupt_but_a_block_that_lasts_too_long_is_not_waited_for():
    then = "signal.raise_signal(signal.SIGHUP); time.sleep(0.1)"
    assert ended(LATE.format(then=then, patience_s=60), signal.SIGHUP) == (0, "ended interrupted, restored")
    assert ended(LATE.format(then="time.sleep(60)", patience_s=0.1), signal.SIGHUP) == (-signal.SIGHUP, "")


@pytest.mark.parametrize(("then", "patience_s"), [("signal.raise_signal(signal.SIGINT); time.sleep(60)", 60), ("time.sleep(60)", 0.1)])
def test_a_second_interrupt_or_a_block_that_lasts_too_long_is_not_waited_for(then, patience_s):
    assert ended(LATE.format(then=then, patience_s=patience_s), signal.SIGINT) == (0, "interrupted, restored")
