"""Who gets the lines of metrics.jsonl beside the file: TensorBoard, and MLflow and W&B where they are installed."""

import contextlib
import importlib.util
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.progress import say
from ray_jobs.core.storage import Storage

TENSORBOARD_FOLDER = "tensorboard"
FLUSH_EVERY_S = 5.0
UPLOAD_EVERY_S = 30.0
_NO_FIGURES = {"step", "wall_time"}


class Tracker(Protocol):
    """One receiver of figures."""

    def log(self, figures: Mapping[str, float], *, step: int, wall_time: float) -> None:
        """Take the figures of a step; a step that it has already, from an attempt before, is not taken again."""

    def close(self, *, failed: bool) -> None:
        """Write what is left."""


class Trackers:
    """Passes each new line on to all trackers; called like any `OnLog`, with all lines so far.

    A tracker whose server fails is left out from then on, with one line on stderr: a run does not end over its picture.
    """

    def __init__(self, trackers: Mapping[str, Tracker]):
        self._trackers = dict(trackers)
        self._num_given = 0

    def __call__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Pass on the lines that came since the last call."""
        for line in lines[self._num_given :]:
            for name in list(self._trackers):
                with self._told_apart(name):
                    self._trackers[name].log(figures(line), step=line["step"], wall_time=line["wall_time"])
        self._num_given = len(lines)

    def close(self, *, failed: bool = False) -> None:
        """Close all trackers."""
        for name in list(self._trackers):
            with self._told_apart(name):
                self._trackers[name].close(failed=failed)

    @contextlib.contextmanager
    def _told_apart(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each client has exceptions of its own
            del self._trackers[name]
            say(f"tracker {name} failed and gets no more lines ({type(error).__name__}: {error}); metrics.jsonl goes on")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that cannot work here, before anything starts.

    Raises:
        ConfigError: its package is not installed, or its environment variables do not say where the figures go.
    """
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(f'run.trackers has "{name}", which is not installed: pip install "raystill[{name}]", or leave it out')
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                'run.trackers has "mlflow", but MLFLOW_TRACKING_URI is not set: set it to a server such as http://127.0.0.1:5000, '
                "or to a folder (file:///home/me/mlruns, with MLFLOW_ALLOW_FILE_STORE=true)"
            )
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
        if name == "wandb" and not (offline or os.environ.get("WANDB_API_KEY")):
            raise ConfigError('run.trackers has "wandb", but WANDB_API_KEY is not set: set it, or WANDB_MODE=offline')


@contextlib.contextmanager
def open_trackers(names: Sequence[str], *, storage: Storage, title: str, settings: Mapping[str, Any]) -> Iterator[Trackers]:
    """Open the named trackers, and close them at the end of the block, as failed where it raises.

    Args:
        names: of "tensorboard", "mlflow", "wandb"; the latter two read their own environment variables.
        storage: the stage's folder. It gets TensorBoard's files, and the ids under which a resumed stage goes on.
        title: what the run is called there.
        settings: what the run was made with.

    Raises:
        ConfigError: a tracker cannot be opened; its server does not answer, for instance.
    """
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}
    opened: dict[str, Tracker] = {}
    for name in names:
        try:
            opened[name] = kinds[name](storage, title=title, settings=settings)
        except Exception as error:
            raise ConfigError(f'run.trackers has "{name}", which cannot be opened ({type(error).__name__}: {error})') from error
    trackers = Trackers(opened)
    try:
        yield trackers
    except BaseException:
        trackers.close(failed=True)
        raise
    trackers.close()


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line by name: {"terms": {"kl": 1.0}} is terms/kl, the second of a list has /rank_1; None is left out."""
    found: dict[str, float] = {}
    for name, value in line.items():
        inner = {f"rank_{rank}": each for rank, each in enumerate(value)} if isinstance(value, list) else value
        if isinstance(inner, Mapping):
            found |= {f"{name}/{key}": float(each) for key, each in inner.items()}
        elif name not in _NO_FIGURES and inner is not None:
            found[name] = float(inner)
    return found


class TensorBoard:
    """Event files in the stage's folder `tensorboard/`.

    Each attempt writes them anew from the first line on, which its checkpoint brought along: so a resumed run has each step
    once. On remote storage they are written here and uploaded every half minute. They are written in the calling thread:
    a SummaryWriter's own thread dies of a full disk, and its queue then blocks the training for ever.
    """

    def __init__(self, storage: Storage, *, title: str, settings: Mapping[str, Any]):
        from tensorboardX.event_file_writer import EventsWriter

        self._storage = storage
        storage.delete(TENSORBOARD_FOLDER)
        self._temporary = None if storage.is_local else tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name if self._temporary else f"{storage.root}/{TENSORBOARD_FOLDER}")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        self._flushed = self._uploaded = time.monotonic()

    def log(self, figures: Mapping[str, float], *, step: int, wall_time: float) -> None:
        """Append the figures."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in figures.items():
            self._writer.write_event(Event(summary=scalar(name, value), step=step, wall_time=wall_time))
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self._flushed = time.monotonic()
            self._writer.flush()
        if self._temporary and time.monotonic() - self._uploaded >= UPLOAD_EVERY_S:
            self._writer.flush()
            self._upload()

    def close(self, *, failed: bool) -> None:
        """Write, and upload, what is left."""
        self._writer.close()
        if self._temporary:
            self._upload()
            self._temporary.cleanup()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        for file in self._folder.iterdir():
            self._storage.write_bytes(f"{TENSORBOARD_FOLDER}/{file.name}", file.read_bytes())


class MLflow:
    """A run at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME or "raystill"; a resumed stage goes on in it."""

    def __init__(self, storage: Storage, *, title: str, settings: Mapping[str, Any]):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._known: dict[str, int] = {}
        if storage.exists("mlflow.json"):
            self._run = storage.read_json("mlflow.json")["run_id"]
            for name in self._client.get_run(self._run).data.metrics:
                self._known[name] = max(metric.step for metric in self._client.get_metric_history(self._run, name))
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raystill")
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run = self._client.create_run(place, run_name=title).info.run_id
        storage.write_json("mlflow.json", {"run_id": self._run})
        for name, value in settings.items():
            self._client.log_param(self._run, name, value)

    def log(self, figures: Mapping[str, float], *, step: int, wall_time: float) -> None:
        """Send the figures that the run does not have from an attempt before."""
        from mlflow.entities import Metric

        new = [Metric(name, value, int(1000 * wall_time), step) for name, value in figures.items() if step > self._known.get(name, -1)]
        if new:
            self._client.log_batch(self._run, metrics=new)

    def close(self, *, failed: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """A run in the project WANDB_PROJECT or "raystill"; a resumed stage goes on in it."""

    def __init__(self, storage: Storage, *, title: str, settings: Mapping[str, Any]):
        import wandb

        if not storage.exists("wandb.json"):
            storage.write_json("wandb.json", {"run_id": uuid.uuid4().hex[:16]})
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raystill"),
            id=storage.read_json("wandb.json")["run_id"],
            resume="allow",
            name=title,
            config=dict(settings),
            dir=os.environ.get("WANDB_DIR", tempfile.gettempdir()),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._first_step = self._run.step

    def log(self, figures: Mapping[str, float], *, step: int, wall_time: float) -> None:
        """Send the figures of a step that the run does not have from an attempt before."""
        if step >= self._first_step:
            self._run.log(dict(figures), step=step)

    def close(self, *, failed: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(failed))
