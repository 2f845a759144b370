"""Endpoints for the run's teacher and student: OpenAI-compatible, on Ray Serve, until Ctrl-C."""

import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_jobs.core.cluster import connect, require
from ray_jobs.core.config import Config, ServeSection
from ray_jobs.core.errors import ClusterError, ConfigError, EndpointError
from ray_jobs.core.progress import say
from ray_jobs.core.run_folder import MODEL_STAGES, RunFolder

KEYS = "RAYSTILL_API_KEYS"
MODELS = ("teacher", "student")
POLL_S = 0.2


def run(config: Config, *, force: bool) -> dict[str, Any]:
    """Serve the run's teacher and student until interrupted; return where they were.

    Args:
        force: has no meaning here; serving leaves nothing behind.

    Raises:
        StageMissing: the teacher or the student is not there yet.
        ConfigError: the bind address needs keys and there are none, or the port is taken.
        ClusterError: no node can hold a replica, or the cluster serves already.
        EndpointError: a model cannot be loaded, or not in time.
    """
    section, keys = config.serve, api_keys()
    section = section.model_copy(update={"port": check_bind(section.host, section.port, keys)})
    folder = RunFolder(config)
    for model in MODELS:
        for stage in MODEL_STAGES[model]:
            folder.finished(stage)
    models = {model: folder.model(model)._asdict() for model in MODELS}
    with connect():
        require("[serve]", {"CPU": section.cpus, "GPU": section.gpus}, section.num_replicas * len(MODELS))
        with _serving(section, models, keys) as url:
            say(f"serve: {', '.join(MODELS)} at {url}/v1 (OpenAI-compatible), both side by side at {url}/ ; Ctrl-C stops")
            _wait_for_signal()
            say("serve: stopping")
    return {"stage": "serve", "url": url, "models": list(MODELS), "headline": [f"serve: {url} is stopped"]}


def api_keys() -> list[str]:
    """Return the keys of RAYSTILL_API_KEYS, separated by commas."""
    return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]


def check_bind(host: str, port: int, keys: list[str]) -> int:
    """Refuse an address that others can reach without a key, and one that cannot be bound; return the port, chosen where 0.

    Raises:
        ConfigError: says which.
    """
    if not keys and not _is_loopback(host):
        raise ConfigError(
            f"[serve] host = {host!r} lets other machines in without a key: set {KEYS} (keys separated by commas) or use 127.0.0.1"
        )
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"[serve] {host}:{port} cannot be bound ({reason}): choose another [serve] port, or stop what uses it") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _serving(section: ServeSection, models: dict[str, Any], keys: list[str]) -> Iterator[str]:
    """Deploy, yield the URL once every model answers, and take it all down again."""
    from ray import serve as ray_serve

    from serve.app import build_app, digest
    from serve.client import wait_until_healthy
    from serve.schema import ServeArgs

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if ray_serve.status().proxies:
        raise ClusterError("this cluster runs Ray Serve already: stop it there (serve shutdown), or unset RAY_ADDRESS")
    deadline = time.monotonic() + section.start_timeout_s
    limits = section.model_dump(include={"num_replicas", "cpus", "gpus", "max_queued", "max_new_tokens"})
    app = build_app(ServeArgs(models=models, key_digests=[digest(key) for key in keys], **limits))
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": section.host, "port": section.port})
        ray_serve.run_many([ray_serve.RunTarget(app, name="raystill")], wait_for_applications_running=False)
        _wait_until_running(deadline)
        url = f"http://{_reachable(section.host)}:{section.port}"
        wait_until_healthy(url, deadline=deadline)
        yield url
    finally:
        ray_serve.shutdown()


def _wait_until_running(deadline: float) -> None:
    """Wait for the replicas, or say in one line why they do not come."""
    from ray import serve as ray_serve

    while True:
        app = ray_serve.status().applications["raystill"]
        if app.status == "RUNNING":
            return
        late = time.monotonic() > deadline
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY") or late:
            reasons = [f"{name}: {part.message.splitlines()[-1]}" for name, part in app.deployments.items() if part.message]
            what = "the endpoints are not ready within [serve] start_timeout_s" if late else "the endpoints cannot start"
            raise EndpointError(f"{what}: {'; '.join(reasons) or app.message or app.status}")
        time.sleep(POLL_S)


def _reachable(host: str) -> str:
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # a bind address is no address to call
    return anywhere.get(host, f"[{host}]" if ":" in host else host)


def _wait_for_signal() -> None:
    """Return at SIGINT or SIGTERM."""
    stopped = threading.Event()
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda *_: stopped.set()) for kind in kinds]
    try:
        stopped.wait()
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
