"""Which judges may prefer their own kind: told by names as users write them, without alarm where names only look alike."""

import pytest

from ray_jobs.core.config_file import validate
from ray_jobs.judge import makers_of
from ray_jobs.judging.families import are_kin, families, kin_of

HUB_CACHE = "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32faf8b98477b0a26969ef7d8b9987"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpt-4o", "openai/gpt-4.1"),
        ("chatgpt-4o-latest", "gpt-4o-mini"),
        ("o3-mini", "gpt-4o"),
        ("openai/gpt-oss-20b", "o1"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1:8b"),
        ("lmsys/vicuna-7b-v1.5", "meta-llama/Llama-2-7b"),
        ("us.meta.llama3-1-70b-instruct-v1:0", "meta-llama/Llama-3.2-1B"),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-1.7B"),
        ("smollm2-135m-instruct", "models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistral-7b"),
        ("Qwen2.5", "qwen3"),
        ("QwQ-32B", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen-max", HUB_CACHE),
        ("deepseek-chat", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        ("qwen3", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        ("google/gemma-2-2b", "gemini-1.5-pro"),
        ("anthropic.claude-3-5-sonnet-20240620-v1:0", "claude-opus-4@20250514"),
        ("tiiuae/falcon-7b", "tiiuae/falcon-40b-instruct"),
        ("./runs/tuned-llama-course", "llama3.1:8b"),
        ("./runs/teacher", "./runs/teacher"),
    ],
)
def test_of_one_family(one, other):
    assert are_kin(one, other) and are_kin(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpt-4o", "EleutherAI/gpt-j-6b"),
        ("gpt-4o", "EleutherAI/gpt-neox-20b"),
        ("gpt-4o", "nomic-ai/gpt4all-13b-snoozy"),
        ("gpt-4o", "meta-llama/Llama-3.1-8B"),
        ("smollm2-135m-instruct", "small-model-of-ours"),
        ("llama3.1:8b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("llama3.1:8b", "/data/llama/runs/qwen-7b"),
        ("mistral-7b", "misty"),
        ("o3-mini", "olmo-2-7b"),
        ("./runs/teacher", "./elsewhere/teacher"),
        ("./models/student/model", "model"),
        ("70b", "7b"),
        ("my-tutor", "my-model"),
        ("", ""),
    ],
)
def test_of_none(one, other):
    assert not are_kin(one, other) and not are_kin(other, one)


def test_a_distilled_model_is_kin_to_both_its_origins_and_each_is_told_once():
    assert families("DeepSeek-R1-Distill-Qwen-7B") == {"deepseek", "qwen"}
    assert kin_of("gpt-4o", ["gpt-4o", "llama3", "openai/gpt-4.1", "gpt-4o"]) == ["gpt-4o", "openai/gpt-4.1"]


def test_whoever_taught_the_student_counts_where_the_student_is_judged():
    run = {"name": "r", "storage": "s"}
    tree = {
        "run": run,
        "teacher": {"model": "meta-llama/Llama-3.1-8B"},
        "student": {"model": "smollm2-135m-instruct"},
        "distill": {"targets": "text", "text": {"model": "gpt-4o", "base_url": "http://localhost:1/v1"}},
    }
    assert makers_of(validate(tree)) == ["meta-llama/Llama-3.1-8B", "smollm2-135m-instruct", "gpt-4o"]
    assert makers_of(validate({**tree, "judge": {"pairs": [["base", "teacher"]]}})) == ["meta-llama/Llama-3.1-8B"]
    assert makers_of(validate({"run": run})) == [validate({"run": run}).teacher.model]
