"""Answering on a real cluster: every model, every question, and a driver that dies on the way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_run import make_run

from ray_jobs import answer
from ray_jobs.core.config_file import to_toml
from ray_jobs.core.errors import ClusterError
from ray_jobs.core.records import Answer
from ray_jobs.core.run_folder import RunFolder

pytestmark = pytest.mark.cluster
OPTIONS = {"answer__dtype": "float32", "answer__batch_size": 2}
MARK_S = 1234.5


def tables(folder: RunFolder) -> dict[str, list[dict]]:
    """Read the answers, without what a clock decides."""
    answers = folder.folder("answer")
    rows = {model: answers.read_parquet(f"{model}.parquet") for model in folder.config.answer.models}
    return {model: [row | {"latency_s": 0} for row in table] for model, table in rows.items()}


def test_each_model_answers_each_question_and_a_killed_driver_changes_nothing(ray_cluster, tiny_config, tmp_path):
    config = tiny_config(**OPTIONS)
    folder = make_run(config)
    manifest = answer.run(config, force=False)
    made = tables(folder)
    asked = [row["question_id"] for row in folder.folder("prepare").read_jsonl("questions.jsonl")]
    for model, rows in made.items():
        assert [Answer.model_validate(row).question_id for row in rows] == asked
        assert {row["model"] for row in rows} == {model}
        assert manifest["counts"][model]["completion_tokens"] == sum(row["completion_tokens"] for row in rows) > 0
        assert manifest["counts"][model]["error"] == 0
    assert len({tuple(row["text"] for row in rows) for rows in made.values()}) == 3
    assert answer.run(config, force=False) == manifest

    killed = tiny_config(**OPTIONS, run__name="killed", answer__models=["base"])
    again = make_run(killed)
    toml = tmp_path / "killed.toml"
    toml.write_text(to_toml(killed))
    parts = Path(again.folder("answer").root, answer.PARTS)
    process = subprocess.Popen([sys.executable, "-m", "ray_jobs", "answer", str(toml)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(parts.glob("base-*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not again.folder("answer").exists("manifest.json")
    kept = mark(again)
    answer.run(killed, force=False)
    assert tables(again)["base"] == made["base"]
    assert not parts.exists()
    latencies = {row["answer_id"]: row["latency_s"] for row in again.folder("answer").read_parquet("base.parquet")}
    assert {answer_id for answer_id, latency_s in latencies.items() if latency_s == MARK_S} == kept != set()


def mark(folder: RunFolder) -> set[str]:
    """Give the answers that are there already a latency by which they are known again; return their ids."""
    parts, marked = folder.folder("answer").sub(answer.PARTS), set()
    for name in parts.names():
        part = parts.read_json(name)
        marked |= {row["answer_id"] for row in part["answers"]}
        parts.write_json(name, part | {"answers": [row | {"latency_s": MARK_S} for row in part["answers"]]})
    return marked


def test_a_worker_that_no_node_can_hold_is_refused_at_once(ray_cluster, tiny_config):
    config = tiny_config(workers__cpus=99)
    make_run(config)
    with pytest.raises(ClusterError, match="99 CPUs"):
        answer.run(config, force=False)
