"""Jobs sent to a cluster of its own, started with `ray start --head` as a stranger would."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from ray_jobs.core.config_file import to_toml

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.cluster


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def address():
    """The job server's URL of a fresh head node, killed by its process group afterwards."""
    folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # socket paths must stay short
    port, dashboard_port, agent_port, client_port = free_ports(4)
    environment = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats"]
    command += [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"]
    command += ["--dashboard-host=127.0.0.1", f"--ray-client-server-port={client_port}", f"--temp-dir={folder}"]
    log = Path(folder, "head.log").open("w")
    head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{dashboard_port}"
    try:
        wait_until_ready(url, head, Path(folder, "head.log"))
        yield url
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(url, head, log):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def raystill(*words, cwd, timeout_s=240):
    """Run the command line in a process of its own, as a user would."""
    command = [BIN / "raystill", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture
def course(tmp_path, tiny_course, tiny_config):
    """A working folder with a config whose inputs are relative and whose storage is absolute; returns the folder."""
    folder = tmp_path / "work"
    shutil.copytree(tiny_course, folder / "inputs")
    config = tiny_config(data__documents=["inputs/*.md"], data__pairs=["inputs/pairs.jsonl"], data__questions="inputs/questions.jsonl")
    (folder / "tiny.toml").write_text(to_toml(config))
    return folder


def test_prepare_runs_on_the_cluster_with_the_files_sent_along(address, course, tmp_path):
    done = raystill("submit", "prepare", "tiny.toml", "--address", address, "--follow", "--run.name", "sent", cwd=course)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "sent" / "prepare" / "manifest.json").is_file()
    assert "next: raystill" in done.stdout  # the job's own last line came through the log


@pytest.mark.timeout(900)
def test_the_whole_chain_runs_as_a_job_whose_worker_takes_every_cpu(address, course, tmp_path):
    few = ["--run.name", "chain", "--workers.cpus", "2", "--compress.variants", '["torch-int8"]', "--compress.num_questions", "1"]
    done = raystill("submit", "run", "tiny.toml", "--address", address, "--follow", *few, cwd=course, timeout_s=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "chain" / "report" / "report.html").is_file()
    assert "next: raystill serve" in done.stdout


def test_the_exit_code_of_a_failing_job_is_passed_on_and_its_line_shown(address, course):
    sent = raystill("submit", "finetune", "tiny.toml", "--address", address, cwd=course)
    assert sent.returncode == 0, sent.stderr
    identifier = sent.stdout.strip()
    followed = raystill("jobs", "logs", "--follow", identifier, "--address", address, cwd=course)
    assert followed.returncode == 2, followed.stdout + followed.stderr
    assert "stage 'prepare' has not finished" in followed.stdout
    assert identifier in raystill("jobs", "list", "--address", address, cwd=course).stdout
    assert raystill("jobs", "status", identifier, "--address", address, cwd=course).returncode == 2


def test_a_stopped_job_is_neither_done_nor_failed(address, course):
    identifier = raystill("submit", "prepare", "tiny.toml", "--address", address, "--run.name", "stopped", cwd=course).stdout.strip()
    assert raystill("jobs", "stop", identifier, "--address", address, cwd=course).stdout.strip() == "STOPPED"
    followed = raystill("jobs", "logs", "--follow", identifier, "--address", address, cwd=course)
    assert followed.returncode == 3, followed.stdout + followed.stderr


def test_an_unknown_job_is_one_line_with_the_way_out(address, course):
    asked = raystill("jobs", "status", "no-such-job", "--address", address, cwd=course)
    assert asked.returncode == 2
    assert "raystill jobs list" in asked.stderr
    assert len(asked.stderr.splitlines()) == 1
