"""Each line reaches each tracker once; TensorBoard's files are read back; what cannot work is refused at the start."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from pyarrow.fs import FileSelector
from tensorboardX.proto import event_pb2

from ray_jobs.core.errors import ConfigError
from ray_jobs.core.storage import Storage
from ray_jobs.training.checkpoint import Progress
from ray_jobs.training.metrics import Log
from ray_jobs.training.timing import STEP, Clock, CommunicationProbe
from ray_jobs.training.trackers import Trackers, check_trackers, figures, open_trackers


def line(step, **more):
    return {"step": step, "loss": 2.0 - 0.25 * step, "wall_time": 1000.0 + step, **more}


class Recorder:
    """Remembers what it is given."""

    def __init__(self, fails_at=None):
        self.given, self.closed, self._fails_at = [], None, fails_at

    def log(self, figures, *, step, wall_time):
        if step == self._fails_at:
            raise ConnectionResetError("the server is gone")
        self.given.append((step, wall_time, dict(figures)))

    def close(self, *, failed):
        self.closed = failed


def scalars(folder):
    """The (tag, step, value, wall time) of all event files, by TensorBoard's own record format: length, crc, data, crc."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value, event.wall_time) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_figures_have_names_that_say_where_they_stood():
    found = figures({"step": 3, "loss": 1.5, "terms": {"kl": 1.0}, "host_peak_bytes": [7, 9], "wall_time": 12.0})
    assert found == {"loss": 1.5, "terms/kl": 1.0, "host_peak_bytes/rank_0": 7, "host_peak_bytes/rank_1": 9}


def test_a_step_whose_gradients_overflowed_is_a_line_that_json_and_trackers_take():
    progress, clock = Progress(), Clock(torch.device("cpu"))
    log = Log(progress, every=1, last=1, clock=clock, probe=CommunicationProbe(world_size=1, first_step=0), on_log=None)
    with clock(STEP):
        pass
    log.add_step(
        {"loss": 1.0, "terms": {"ce": 1.0}, "label_tokens": 4, "learning_rate": 1e-4, "grad_norm": float("inf")}, tokens=8, seconds=1.0
    )
    (written,) = progress.log
    assert json.loads(json.dumps(written, allow_nan=False))["grad_norm"] is None
    assert "grad_norm" not in figures(written) and figures(written)["loss"] == 1.0


def test_each_line_is_given_once():
    recorder = Recorder()
    trackers = Trackers({"recorder": recorder})
    lines = [line(1)]
    trackers(lines)
    lines += [line(2), {"step": 2, "eval_loss": 1.0, "wall_time": 1002.5}]
    trackers(lines)
    trackers(lines)
    trackers.close()
    assert [step for step, _, _ in recorder.given] == [1, 2, 2]
    assert recorder.given[2] == (2, 1002.5, {"eval_loss": 1.0})
    assert recorder.closed is False


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(capsys):
    lost, kept = Recorder(fails_at=2), Recorder()
    trackers = Trackers({"lost": lost, "kept": kept})
    trackers([line(1), line(2), line(3)])
    trackers.close()
    assert [step for step, _, _ in kept.given] == [1, 2, 3]
    assert len(lost.given) == 1 and lost.closed is None
    assert capsys.readouterr().err.count("tracker lost failed") == 1


def test_tensorboard_has_every_figure_with_its_own_time(tmp_path):
    storage = Storage(str(tmp_path))
    with open_trackers(["tensorboard"], storage=storage, title="run", settings={}) as trackers:
        trackers([line(1), line(2)])
    assert scalars(tmp_path / "tensorboard") == [("loss", 1, 1.75, 1001.0), ("loss", 2, 1.5, 1002.0)]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    storage = Storage(str(tmp_path))
    with pytest.raises(KeyboardInterrupt), open_trackers(["tensorboard"], storage=storage, title="run", settings={}) as trackers:
        trackers([line(1), line(2), line(3)])
        raise KeyboardInterrupt
    with open_trackers(["tensorboard"], storage=storage, title="run", settings={}) as trackers:
        trackers([line(1), line(2), line(3), line(4)])  # its checkpoint brought the first two along
    assert [step for _, step, _, _ in scalars(tmp_path / "tensorboard")] == [1, 2, 3, 4]


def test_remote_storage_gets_the_files_at_the_end(tmp_path):
    storage = Storage("mock://stage")
    storage.fs.create_dir(storage.root, recursive=True)
    with open_trackers(["tensorboard"], storage=storage, title="run", settings={}) as trackers:
        trackers([line(1)])
    (name,) = [info.base_name for info in storage.fs.get_file_info(FileSelector(f"{storage.root}/tensorboard"))]
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / name).write_bytes(storage.read_bytes(f"tensorboard/{name}"))
    assert scalars(tmp_path / "copy") == [("loss", 1, 1.75, 1001.0)]


def test_the_default_needs_nothing():
    check_trackers(["tensorboard"])
    check_trackers([])


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_refused_with_the_command(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=rf'pip install "raystill\[{name}\]"'):
        check_trackers([name])


def test_a_tracker_without_its_environment_is_refused(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        check_trackers(["mlflow"])


def test_mlflow_gets_each_step_once_over_two_attempts(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    storage = Storage(str(tmp_path / "stage"))
    for lines in ([line(1), line(2), line(3)], [line(1), line(2), line(3), line(4)]):
        with open_trackers(["mlflow"], storage=storage, title="run/finetune", settings={"rank": 4}) as trackers:
            trackers(lines)
    client = mlflow.MlflowClient()
    run = storage.read_json("mlflow.json")["run_id"]
    assert [metric.step for metric in client.get_metric_history(run, "loss")] == [1, 2, 3, 4]
    assert client.get_run(run).info.status == "FINISHED"
    assert client.get_run(run).data.params == {"rank": "4"}


def test_wandb_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    check_trackers(["wandb"])
    storage = Storage(str(tmp_path / "stage"))
    with open_trackers(["wandb"], storage=storage, title="run/finetune", settings={}) as trackers:
        trackers([line(1), line(2)])
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_full_disk_costs_the_picture_and_not_the_run(tmp_path):
    program = f"""
import resource
from ray_jobs.core.storage import Storage
from ray_jobs.training.trackers import open_trackers
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
lines = []
with open_trackers(["tensorboard"], storage=Storage({str(tmp_path)!r}), title="run", settings={{}}) as trackers:
    for step in range(1000):
        lines.append({{"step": step, "loss": 1.0, "wall_time": 0.0}})
        trackers(lines)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stderr.count("tracker tensorboard failed and gets no more lines (OSError") == 1
