"""The chat template with real tokenizers: what is trained, and that prompts are those of generation."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from ray_jobs.core.errors import ModelError
from ray_jobs.corpus.template import ChatTemplate, chat_messages, require_chat_template


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def with_template(smollm2, tmp_path):
    """The embedded tokenizer under another chat template."""

    def make(jinja):
        for file in smollm2.glob("*token*"):
            shutil.copy(file, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(jinja)
        return ChatTemplate(tmp_path)

    return make


def trained(encoded):
    return encoded.input_ids[encoded.num_untrained :]


@pytest.mark.parametrize("system_prompt", ["", "Answer like a lecturer."])
@pytest.mark.parametrize("answer", ["It keeps the CPU busy.", "1. Erstens\n2. Zweitens: größer", " x "])
def test_only_the_answer_and_its_end_are_trained(smollm2, tokenizer, answer, system_prompt):
    encoded = ChatTemplate(smollm2, system_prompt=system_prompt).encode_pair("Why does a scheduler preempt?", answer)
    prompt = tokenizer.apply_chat_template(
        chat_messages("Why does a scheduler preempt?", system_prompt), add_generation_prompt=True, return_dict=False
    )
    assert encoded.input_ids[: encoded.num_untrained] == prompt
    assert tokenizer.decode(trained(encoded)) == answer + "<|im_end|>"


def test_the_system_prompt_is_said_only_if_given():
    assert chat_messages("Q?") == [{"role": "user", "content": "Q?"}]
    assert [message["role"] for message in chat_messages("Q?", "S")] == ["system", "user"]


def test_plain_text_is_trained_but_for_its_first_token(smollm2, tokenizer):
    template = ChatTemplate(smollm2)
    encoded = template.encode_text("A page table maps pages.")
    assert encoded.num_untrained == 1 and tokenizer.decode(encoded.input_ids) == "A page table maps pages."
    assert template.count("A page table maps pages.") == len(encoded.input_ids)


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|endoftext|>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHANGING = "{% for m in messages %}{{ m.role + (messages | length | string) + m.content }}{% endfor %}"


def test_a_template_in_the_style_of_llama_2(with_template, tokenizer):
    encoded = with_template(LLAMA_2).encode_pair("Q?", "An answer.")
    assert tokenizer.decode(encoded.input_ids) == "<|endoftext|>[INST] Q? [/INST] An answer. <|im_end|>"
    assert tokenizer.decode(trained(encoded)) == " An answer. <|im_end|>"


def test_a_template_that_writes_no_end_gets_one(with_template, tokenizer):
    encoded = with_template(WITHOUT_END).encode_pair("Q?", "An answer.")
    assert tokenizer.decode(trained(encoded)).strip() == "An answer.<|im_end|>"
    assert encoded.input_ids[: encoded.num_untrained] == tokenizer("user: Q?assistant: ").input_ids


def test_a_template_that_rewrites_the_prompt_is_refused(with_template):
    with pytest.raises(ModelError, match="writes another prompt"):
        with_template(CHANGING).encode_pair("Q?", "A.")


def test_a_model_without_a_chat_template_is_refused(smollm2, tmp_path):
    require_chat_template(smollm2, "m")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ModelError, match="no chat template"):
        require_chat_template(tmp_path, "m")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    require_chat_template(tmp_path, "m")
