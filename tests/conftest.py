"""Shared parts: one Ray cluster a session, the real small model, a tiny one of its shape, tiny course files."""

import json
import os
from pathlib import Path

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
    HF_HUB_OFFLINE="1",
)

import pytest

CPUS = 4  # more than CI's two cores: what is tested is scheduling, not speed


@pytest.fixture(scope="session")
def ray_cluster():
    """The session's real cluster, exported as RAY_ADDRESS so that jobs in other processes join it."""
    import ray

    ray.init(num_cpus=CPUS, object_store_memory=300 * 2**20, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield ray
    ray.shutdown()
    os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted folder of the embedded language model."""
    from ray_jobs.core.models import resolve_model

    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_model(smollm2, tmp_path_factory) -> Path:
    """A random 4-layer Llama (3.4 M parameters) with the embedded model's tokenizer and chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_course(tmp_path_factory) -> Path:
    """A folder with notes.md, pairs.jsonl (24 pairs) and questions.jsonl (4 questions)."""
    folder = tmp_path_factory.mktemp("tiny-course")
    parts = ["kernel", "scheduler", "page table", "inode", "semaphore", "driver"]
    facts = [
        ("What does the {} do on line {}?", "The {} keeps record number {} and answers requests in order."),
        ("Why is the {} of unit {} needed?", "Without the {} unit {} would lose its state after an interrupt."),
        ("When does the {} number {} stop?", "The {} number {} stops when its queue is empty and no timer is set."),
        ("Name one cost of the {} at level {}.", "The {} at level {} costs memory for its table and time for each lookup."),
    ]
    pairs = [
        {"question": q.format(part, i), "answer": a.format(part, i), "topic": part, "language": "en"}
        for i, part in enumerate(parts)
        for q, a in facts
    ]
    questions = [
        {"question": f"Explain the {part}.", "reference": f"The {part} keeps records. It answers requests in order.", "topic": part}
        for part in parts[:4]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    sections = "\n\n".join(f"## The {part}\n\n" + " ".join(a.format(part, i) for _, a in facts) for i, part in enumerate(parts))
    (folder / "notes.md").write_text(f"# Notes\n\n{sections}\n")
    return folder


@pytest.fixture
def tiny_config(tiny_model, tiny_course, tmp_path):
    """A function that returns the Config of a tiny run below tmp_path, with dotted overrides applied."""
    from ray_jobs.core.config_file import validate

    def make(**overrides):
        tree = {
            "run": {"name": "tiny", "storage": str(tmp_path / "runs")},
            "teacher": {"model": str(tiny_model)},
            "student": {"layers": 2},
            "data": {
                "documents": [str(tiny_course / "notes.md")],
                "pairs": [str(tiny_course / "pairs.jsonl")],
                "questions": str(tiny_course / "questions.jsonl"),
                "max_length": 128,
                "chunk_tokens": 64,
            },
            "finetune": {"max_steps": 4, "global_batch_size": 4, "checkpoint_every_steps": 2, "lora": {"rank": 4}},
            "distill": {"max_steps": 4, "global_batch_size": 4, "checkpoint_every_steps": 2},
            "answer": {"max_new_tokens": 8, "batch_size": 2},
            "workers": {"cpus": 1, "memory": "3GiB"},
        }
        for key, value in overrides.items():
            *sections, field = key.split("__")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[field] = value
        return validate(tree)

    return make


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
