"""Any job on a cluster that runs already: send it, follow its log, list, stop. Exit codes are the job's own.

0 done; 1 and 2 as the job says; 3 stopped; 4 the cluster does not answer; 130 interrupted here, the job goes on.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray_jobs import __version__
from ray_jobs.__main__ import FORCE_HELP, JOBS
from ray_jobs.core.config_file import load_config
from ray_jobs.core.errors import ClusterError, ClusterUnreachable
from ray_jobs.core.progress import say
from ray_jobs.core.shipment import CONFIG_NAME, pack

STOPPED = 3
POLL_S = 0.5
CONNECT_TIMEOUT_S = 10
DASHBOARD_PORT = 8265
JOB_ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": "30",  # after 3 seconds, Ray's default, a job would be killed before its last checkpoint
    "PYTHONUNBUFFERED": "1",
}
"""Never a key or a password: whoever reaches the cluster can read it."""


def main(arguments: list[str]) -> int:
    """Run `submit ...` or `jobs ...` and return the exit code."""
    command, *rest = arguments
    if command == "submit":
        options, overrides = _submit_parser().parse_known_args(rest)
        return _submit(options, overrides)
    options = _jobs_parser().parse_args(rest)
    with _client(options.address) as client:
        return ACTIONS[options.action](client, options)


def _submit(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(options.config, overrides)
    with tempfile.TemporaryDirectory() as name:
        shipment = pack(config, Path(name))
        with _client(options.address) as client:
            identifier = client.submit_job(
                entrypoint=f"python -m ray_jobs {options.job} {CONFIG_NAME}{' --force' if options.force else ''}",
                submission_id=f"{config.run.name}-{options.job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
                runtime_env={"working_dir": name, "env_vars": JOB_ENVIRONMENT},
                metadata={"job": options.job, "run": config.run.name, "raystill": __version__},
            )
    say(f"submit: sent {shipment.num_bytes / 2**20:.1f} MiB; read and written on the cluster: {', '.join(shipment.of_cluster)}")
    print(identifier, flush=True)
    options.id = identifier
    if options.follow:
        with _client(options.address) as client:
            return _logs(client, options)
    for action in ("logs --follow", "status", "stop"):
        say(f"next: raystill jobs {action} {identifier} --address {options.address}")
    return 0


def _logs(client: Any, options: argparse.Namespace) -> int:
    """Print the log; while following, wait for the end and return the job's exit code."""
    if not options.follow:
        sys.stdout.write(client.get_job_logs(options.id))
        return 0
    try:
        asyncio.run(_tail(client, options.id))
        while not client.get_job_status(options.id).is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say(f"raystill: no longer following, the job goes on: raystill jobs logs --follow {options.id} --address {options.address}")
        return 130
    return _report_end(client.get_job_info(options.id))


async def _tail(client: Any, identifier: str) -> None:
    async for piece in client.tail_job_logs(identifier):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _report_end(info: Any) -> int:
    """Say how a job ended and return its exit code; one that never ran its command has none and counts as failed."""
    codes = {"SUCCEEDED": 0, "STOPPED": STOPPED, "FAILED": info.driver_exit_code or 1}
    reason = f": {info.message.splitlines()[0]}" if info.message and info.driver_exit_code is None else ""
    say(f"raystill: job {info.submission_id} {info.status.value.lower()}, exit code {codes[info.status.value]}{reason}")
    return codes[info.status.value]


def _status(client: Any, options: argparse.Namespace) -> int:
    """Print where the job stands; the exit code is the job's once it has ended, 0 before."""
    info = client.get_job_info(options.id)
    print(info.status.value)
    return _report_end(info) if info.status.is_terminal() else 0


def _stop(client: Any, options: argparse.Namespace) -> int:
    """Stop the job and wait until it has ended."""
    client.stop_job(options.id)
    while not client.get_job_status(options.id).is_terminal():
        time.sleep(POLL_S)
    print(client.get_job_status(options.id).value)
    return 0


def _list(client: Any, options: argparse.Namespace) -> int:
    """Print the jobs, newest first."""
    jobs = [info for info in client.list_jobs() if info.submission_id]
    for info in sorted(jobs, key=lambda info: -(info.start_time or 0)):
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime((info.start_time or 0) / 1000))
        print(f"{info.status.value:<10} {began}  {info.submission_id}")
    return 0


ACTIONS = {"list": _list, "status": _status, "logs": _logs, "stop": _stop}


@contextlib.contextmanager
def _client(address: str) -> Iterator[Any]:
    """Yield the client of a cluster's job server; what goes wrong in the block becomes one line."""
    import requests
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray would prefer a RAY_ADDRESS that is set to the one given
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
        yield JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterUnreachable(f"{address} refuses the token (set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH): {_line(error)}") from None
    except (OSError, requests.RequestException, ClientError) as error:
        raise ClusterUnreachable(
            f"no Ray job server answers at {address}: {_line(error)}; is the cluster up, the port forwarded?"
        ) from None
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise ClusterError(f"{address} knows no such job: `raystill jobs list --address {address}` shows those it knows") from None
        raise ClusterUnreachable(f"the job server at {address} failed: {_line(error)}") from None


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ClusterError(f"--address {address!r} is no job server: give its URL, like http://127.0.0.1:{DASHBOARD_PORT}")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _submit_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raystill submit",
        usage="raystill submit JOB CONFIG --address URL [--follow] [--force] [--section.field value ...]",
        description="Run a job on a cluster where raystill's dependencies are installed. Relative input paths are sent along; "
        "absolute paths and URIs are the cluster's own. Keys are read there too, from its environment.",
        allow_abbrev=False,
    )
    parser.add_argument("job", choices=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; its [run] storage must be a URI or absolute path")
    _add_address(parser)
    parser.add_argument("--follow", action="store_true", help="print the job's log until it ends, and exit with its code")
    parser.add_argument("--force", action="store_true", help=FORCE_HELP)
    return parser


def _jobs_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raystill jobs", description="Submitted jobs of a cluster.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        sub = actions.add_parser(name, help=(action.__doc__ or "").splitlines()[0], allow_abbrev=False)
        if name != "list":
            sub.add_argument("id", metavar="ID", help="what submit printed")
        if name == "logs":
            sub.add_argument("--follow", action="store_true", help="go on until the job ends, and exit with its code")
        _add_address(sub)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", required=True, metavar="URL", help=f"job server, like http://127.0.0.1:{DASHBOARD_PORT}")
