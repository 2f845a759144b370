"""Connect to Ray, or start it here; refuse at once what no node can ever hold; carry progress to the driver."""

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_jobs.core.autoscaling import NodeTypes, groups_fitting, most_fitting, node_types, times_fitting
from ray_jobs.core.errors import ClusterError, JobError
from ray_jobs.core.interrupts import hangups_blocked, terminate_as_interrupt
from ray_jobs.core.progress import Bar, OnProgress, say
from ray_jobs.core.sizes import both_units
from ray_jobs.core.sizing import memory_hints

OBJECT_STORE_BYTES = 10**9
START_TIMEOUT_S = 120
NODE_TIMEOUT_S = 1800
"""A cloud machine, its container and its packages take minutes."""
NODE_POLL_S = 5
POLL_S = 0.5
RETRIES = {"max_restarts": 3, "max_task_retries": 3}
"""What a Ray Data pool is given: by default Ray replaces an actor that dies each time for ever."""
_started_here = threading.Event()
_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # OpenMP threads that wait by spinning take the core from the thread they wait for: several times slower on a busy machine
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}


@contextlib.contextmanager
def connect() -> Iterator[None]:
    """Use the cluster of RAY_ADDRESS, else start one on this machine for as long as the block lasts.

    Inside another `connect` block it joins that one.

    Raises:
        ClusterError: no cluster answers at RAY_ADDRESS.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        _started_here.set()
    _start(address)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        ray.shutdown()
        if address is None:
            del os.environ["RAY_ADDRESS"]
            _started_here.clear()


def _start(address: str | None) -> None:
    import ray

    logs = bool(os.environ.get("RAYSTILL_RAY_LOGS"))
    local: dict[str, Any] = {} if address else {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": True}
    level = logging.INFO if logs else logging.ERROR
    try:
        with hangups_blocked():  # Ray gives what it starts neither a group of its own nor, but for SIGINT, a mask
            ray.init(address=address or "local", log_to_driver=logs, logging_level=level, **local)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={address!r}: {error}; start one or unset RAY_ADDRESS") from None
    terminate_as_interrupt()  # ray.init gave SIGTERM a meaning of its own: exit code 15
    import ray.data

    # RETRIES have no other place in this version of Ray
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated", category=DeprecationWarning)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = START_TIMEOUT_S
    logging.getLogger("ray.data").setLevel(level)


def require(what: str, bundle: dict[str, float], count: int = 1) -> None:
    """Refuse `count` bundles that this cluster can never hold, even when idle; wait for nodes that it can still start.

    Args:
        what: who asks, for the message, like "[workers] of finetune".
        bundle: {"CPU": n, "GPU": n, "memory": bytes}.

    Raises:
        ClusterError: says what is asked, and what each node has; or the nodes did not start in NODE_TIMEOUT_S.
    """
    fitting = capacity(bundle)
    if fitting >= count:
        return
    config = NodeTypes({}, 0) if _started_here.is_set() else node_types()
    possible = max(fitting, most_fitting(bundle, config))
    if possible >= count:
        _await_nodes(what, bundle, count)
        return
    offers = [f"node {i + 1}: {_words(node)}" for i, node in enumerate(node_resources())]
    offers += [f"node type {name}: {_words(kind.resources)}, {kind.max_nodes} at most" for name, kind in config.kinds.items()]
    raise ClusterError(
        f"{what} needs {count} x ({_words(bundle)}), but this cluster can hold {possible} at most ({'; '.join(offers)}): "
        f"lower [workers] num_workers, cpus, gpus or memory, or add nodes{memory_hints(bundle, list(node_resources()))}"
    )


def require_together(asks: Sequence[tuple[str, dict[str, float], int]]) -> None:
    """Refuse bundles of several kinds that work at the same time, and that this cluster can never hold at the same time.

    Args:
        asks: who asks, the bundle and how many, as `require` takes them.

    Raises:
        ClusterError: as `require`; or one fits, and another beside it does not.
    """
    for what, bundle, count in asks:
        require(what, bundle, count)
    group = sorted((bundle for _, bundle, count in asks for _ in range(count)), key=lambda bundle: -bundle.get("CPU", 0))
    if _started_here.is_set() or not node_types().kinds:
        if groups_fitting(group, node_resources(), at_most=1):
            return
        wanted = " and ".join(f"{what} {count} x ({_words(bundle)})" for what, bundle, count in asks)
        offers = "; ".join(f"node {i + 1}: {_words(node)}" for i, node in enumerate(node_resources()))
        raise ClusterError(
            f"{wanted} are needed at the same time, and this cluster cannot hold them beside each other ({offers}): "
            "lower one of them, or add nodes"
        )


def _await_nodes(what: str, bundle: dict[str, float], count: int) -> None:
    """Ask the autoscaler for nodes and wait; they go again by themselves when idle."""
    from ray.autoscaler.sdk import request_resources

    say(f"{what}: waiting for the cluster to start nodes ...")
    deadline = time.monotonic() + NODE_TIMEOUT_S
    request_resources(bundles=[{key: amount for key, amount in bundle.items() if amount}] * count)
    try:
        while capacity(bundle) < count:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{what} needs {count} x ({_words(bundle)}), and the cluster has room for {capacity(bundle)} after waiting "
                    f"{NODE_TIMEOUT_S} s for nodes: see `ray status` on its head for why they do not start"
                )
            time.sleep(NODE_POLL_S)
    finally:
        request_resources(bundles=[])  # a standing request would keep the nodes for ever


@contextlib.contextmanager
def name_lost_workers(what: str) -> Iterator[None]:
    """Turn the end of a pool whose workers died again and again into one line.

    Raises:
        JobError: a worker was lost for good; an error that a worker raised passes as it is.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise JobError(
            f"{what}: a worker died {RETRIES['max_restarts'] + 1} times or cannot start ({reason}): "
            "give it more memory or look at its log (RAYSTILL_RAY_LOGS=1); the same command goes on"
        ) from error


def capacity(bundle: dict[str, float]) -> int:
    """Return how many such bundles this cluster's nodes can hold together when idle."""
    return sum(times_fitting(bundle, node) for node in node_resources())


def node_resources() -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _words(resources: Mapping[str, float]) -> str:
    memory = both_units(resources.get("memory", 0))
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {memory} memory"


class _Board:
    """Holds the latest progress of workers, in an actor."""

    def __init__(self) -> None:
        self._latest = (0, 0, "")

    def put(self, done: int, total: int, note: str) -> None:
        """Remember the latest state."""
        self._latest = (done, total, note)

    def get(self) -> tuple[int, int, str]:
        """Return the latest state."""
        return self._latest


class BoardSink:
    """Progress callback for workers: sends to the driver's board without waiting; picklable."""

    def __init__(self, actor: Any):
        self._actor = actor

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Send the state."""
        self._actor.put.remote(done, total, note)


@contextlib.contextmanager
def progress_board(label: str, unit: str, *, each_note: bool = False) -> Iterator[OnProgress]:
    """Yield a callback that workers anywhere may call; the driver shows it as a bar.

    Needs a connected cluster.

    Args:
        each_note: without a terminal, show every new note (see `Bar`).
    """
    import ray

    actor: Any = ray.remote(num_cpus=0)(_Board).remote()
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(actor, Bar(label, unit, each_note=each_note), ended), daemon=True)
    thread.start()
    try:
        yield BoardSink(actor)
    finally:
        ended.set()
        thread.join()
        ray.kill(actor)


def _show(actor: Any, bar: Bar, ended: threading.Event) -> None:
    import ray

    with bar:
        going_on = True
        while going_on:
            going_on = not ended.wait(POLL_S)  # asked once more at the end, for the last note
            try:
                done, total, note = ray.get(actor.get.remote(), timeout=10)
            except ray.exceptions.RayError:
                return  # a bar is no reason to end a job: the job itself reports a lost cluster
            if total:
                bar(done, total, note)
