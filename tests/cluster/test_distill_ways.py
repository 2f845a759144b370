"""distill as a user runs it, by the ways of teaching that need no logits of one vocabulary at hand: written answers, another
tokenizer, answers of the student's own."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from judge_server import Fault, JudgeServer, completion
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ray_jobs import distill
from ray_jobs.core.config_file import to_toml
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.training.batches import PackedRows
from ray_jobs.training.loop import train
from ray_jobs.training.recipe import Recipe

pytestmark = pytest.mark.cluster
IN_FLIGHT = 2


@pytest.fixture
def taught(tiny_config, finetuned):
    """A run's config as a function of overrides; its `prepare` and `finetune` are another run's."""
    first = finetuned(run__name="first")
    return lambda **overrides: tiny_config(run__stages_from=[RunFolder(first).storage.uri], **overrides)


def test_an_endpoints_answers_are_paid_once_though_the_driver_is_killed(taught, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXT_KEY", "secret")

    def answered(number, request):
        return Fault(body=completion(f"The answer to: {request['messages'][-1]['content']}"))

    with JudgeServer(answered, latency_s=0.2).running() as server:
        text = {"model": "gpt-4", "base_url": server.url, "api_key_env": "TEXT_KEY", "max_concurrency": IN_FLIGHT}
        config = taught(distill__targets="text", distill__text=text, distill__max_steps=8, distill__learning_rate=1e-2)
        (tmp_path / "run.toml").write_text(to_toml(config))
        driver = subprocess.Popen([sys.executable, "-m", "ray_jobs", "distill", str(tmp_path / "run.toml")], stderr=subprocess.DEVNULL)
        while len(server.requests) < 6:
            assert driver.poll() is None
            time.sleep(0.01)
        driver.kill()
        driver.wait()
        paid = [name for name in RunFolder(config).folder("distill").sub("texts").sub("replies").names() if name.endswith(".json")]
        kept, asked = len(paid), len(server.requests)
        assert asked - kept <= IN_FLIGHT
        manifest = distill.run(config, force=False)
        questions = [request["messages"][-1]["content"] for request in server.requests]
    rows = RunFolder(config).folder("distill").sub("texts").read_jsonl("answers.jsonl")
    assert 0 < kept < len(rows)
    assert len(questions) == asked + len(rows) - kept
    assert set(questions) == {row["question"] for row in rows}
    assert manifest["eval"]["kl_after_nats"] is None
    assert [line["terms"].keys() for line in metrics(config)] == [{"ce"}] * 8
    assert metrics(config)[-1]["loss"] < metrics(config)[0]["loss"] - 0.5
    card = (RunFolder(config).folder("distill").local("student") / "README.md").read_text()
    assert f"{len(rows)} answers by gpt-4 " in card and "secret" not in card


def test_a_model_of_our_own_writes_in_the_cluster_what_the_student_learns(taught, tiny_model, tmp_path):
    writer = tmp_path / "writer"
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model.generation_config = GenerationConfig(eos_token_id=list(range(0, 49152, 3)), pad_token_id=2)  # so that answers end
    model.save_pretrained(writer)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(writer)
    text = {"model": str(writer), "max_new_tokens": 12, "sampling_temperature": 1.0}
    config = taught(distill__targets="text", distill__text=text, distill__max_steps=2)
    distill.run(config, force=False)
    folder = RunFolder(config).folder("distill").sub("texts")
    rows, counts = folder.read_jsonl("answers.jsonl"), folder.read_json("counts.json")
    usable = [row for row in rows if not row["error"]]
    assert 0 < len(usable) == counts["answers"] - counts["failed"]
    assert all(row["text"].strip() and row["completion_tokens"] <= 12 for row in usable)
    assert {row["error"] for row in rows} <= {"", "empty answer", "the answer was cut at distill.text.max_new_tokens"}
    assert RunFolder(config).folder("distill").exists("student/model.safetensors")


def sharper(model, folder):
    """Write an untrained model whose words are sure: from one that is nearly uniform each student is equally far."""
    loaded = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(50)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def test_a_student_with_another_tokenizer_comes_nearer_to_the_teacher(taught, tiny_model, tmp_path):
    small = Tokenizer(models.BPE())
    small.pre_tokenizer, small.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    small.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    bpe = PreTrainedTokenizerFast(tokenizer_object=small, bos_token="<s>", eos_token="</s>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe), **shape)).save_pretrained(tmp_path / "own")
    bpe.save_pretrained(tmp_path / "own")
    config = taught(
        teacher={"model": sharper(tiny_model, tmp_path / "sharp")},
        student={"model": str(tmp_path / "own")},
        distill__vocabulary="uld",
        distill__targets="pool",
        distill__pool={"memory": "2GiB"},
        distill__learning_rate=1e-2,
        distill__ce_weight=0.5,
    )
    losses = distill.run(config, force=False)["eval"]
    assert losses["uld_after"] < losses["uld_before"] - 0.005
    assert losses["ce_after_nats"] < losses["ce_before_nats"] - 0.3
    student = AutoTokenizer.from_pretrained(RunFolder(config).folder("distill").local("student"))
    assert "<|im_start|>" in student.chat_template


def test_own_answers_go_on_after_a_lost_worker_as_in_one_undisturbed_process(taught):
    own = {"share": 0.5, "max_new_tokens": 6}
    options = {"distill__on_policy": own, "distill__divergence": "reverse_kl", "distill__learning_rate": 1e-3}
    config = taught(distill__max_steps=12, distill__max_failures=1, distill__dtype="float32", **options)
    killed: list[int] = []
    killer = threading.Thread(target=kill_worker_after, args=(config, 4, killed))
    killer.start()
    manifest = distill.run(config, force=False)
    killer.join()
    assert len(killed) == 1
    lines = metrics(config)
    assert [line["counts"]["on_policy_tokens"] > 0 for line in lines] == [False, True] * 6
    assert manifest["on_policy"]["tokens"] == sum(line["counts"]["on_policy_tokens"] for line in lines)
    folder = RunFolder(config)
    job = distill.make_job(config, folder.model("teacher"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student, loss = job.build(job.student_from(job.first_start()), {}, 1, {}, "cpu")
    rows = PackedRows(folder.folder("prepare").local("train"))
    train(student, loss, rows, eval_rows=None, recipe=Recipe.of(config.distill.model_dump(), seed=config.run.seed))
    torch.set_num_threads(threads)
    undisturbed, written = student.state_dict(), load_file(folder.folder("distill").local("student") / "model.safetensors")
    torch.testing.assert_close(written, {name: undisturbed[name] for name in written}, rtol=0, atol=1e-6)


def kill_worker_after(config, step, killed):
    """Kill the training worker once a checkpoint of that step, or a later one, is there."""
    checkpoints = RunFolder(config).storage.sub("distill").sub("checkpoints")
    ended = time.monotonic() + 120
    while not any(int(name.removeprefix("step-")) >= step for name in checkpoints.names() if name.startswith("step-")):
        if time.monotonic() > ended:
            return
        time.sleep(0.02)
    for process in psutil.Process(os.getpid()).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)


def metrics(config):
    """Return the lines of the steps."""
    return [line for line in RunFolder(config).folder("distill").read_jsonl("metrics.jsonl") if "loss" in line and "step" in line]
