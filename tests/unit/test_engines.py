import json
import shutil
import threading
from pathlib import Path

import pytest
from made_run import make_run

from serve.engines import REPLACEMENT, ChatRefused, Completion, PromptTooLong, TransformersEngine, unsent

CHATS = [
    [{"role": "user", "content": "What is a page table?"}],
    [{"role": "user", "content": "Why?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name the parts of an inode and " + "so on " * 20}],
    "A process is",
]


@pytest.fixture(scope="module")
def engine(tiny_model):
    return TransformersEngine(str(tiny_model), dtype="float32")


def reference(engine, prompt, max_new_tokens):
    """Greedy ids by the library's own loop, one prompt at a time."""
    tokenizer = engine.tokenizer
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = engine.model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return ids[encoded["input_ids"].shape[1] :].tolist()


def test_batch_answers_as_the_library_does_for_each_prompt_alone(engine):
    made = engine.generate(CHATS, max_new_tokens=12)
    for prompt, completion in zip(CHATS, made, strict=True):
        expected = reference(engine, prompt, 12)
        assert completion.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert completion.completion_tokens == len(expected)


def variant(tiny_model, folder, file, **changes):
    """Copy the tiny model with other values in one of its JSON files."""
    copy = Path(shutil.copytree(tiny_model, folder / "variant"))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return TransformersEngine(str(copy), dtype="float32")


def test_rows_that_end_leave_the_batch_and_the_others_go_on_as_alone(engine, tiny_model, tmp_path):
    ends = reference(engine, CHATS[1], 5)[4]
    ending = variant(tiny_model, tmp_path, "generation_config.json", eos_token_id=[2, ends])
    alone = [ending.generate([prompt], max_new_tokens=12)[0] for prompt in CHATS]
    assert ending.generate(CHATS, max_new_tokens=12) == alone
    assert alone[1].finish_reason == "stop"
    assert alone[1].completion_tokens <= 5
    assert {completion.finish_reason for completion in alone} == {"stop", "length"}


def test_stream_gives_the_same_text_in_pieces_and_then_the_completion(engine):
    for prompt in CHATS:
        *pieces, last = engine.stream(prompt, max_new_tokens=12)
        assert last == engine.generate([prompt], max_new_tokens=12)[0]
        assert "".join(pieces) == last.text
        assert len(pieces) > 1


def test_characters_of_several_tokens_are_never_sent_torn(engine):
    text, sent = "Größe 🦜 ok", ""
    ids = engine.tokenizer(text, add_special_tokens=False).input_ids
    for end in range(1, len(ids) + 1):
        piece = unsent(engine.tokenizer.decode(ids[:end]), sent)
        assert REPLACEMENT not in piece
        sent += piece
    assert sent == text


def test_sampling_depends_on_the_seed_alone(engine):
    def draw(seed):
        return engine.generate(CHATS[:2], max_new_tokens=8, sampling_temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1) != engine.generate(CHATS[:2], max_new_tokens=8)


def test_a_low_sampling_temperature_tends_to_greedy(engine):
    assert engine.generate(CHATS, max_new_tokens=4, sampling_temperature=1e-5) == engine.generate(CHATS, max_new_tokens=4)


def test_context_bounds_prompt_and_answer(tiny_model, tmp_path):
    short = variant(tiny_model, tmp_path, "config.json", max_position_embeddings=40)
    completion = short.generate([CHATS[1]], max_new_tokens=99)[0]
    assert completion.prompt_tokens + completion.completion_tokens == 40
    assert completion.finish_reason == "length"
    with pytest.raises(PromptTooLong, match=r"tokens and the model's context 40"):
        short.generate([CHATS[1], CHATS[2]], max_new_tokens=1)


def test_adapter_is_merged(tiny_model, tiny_config):
    folder = make_run(tiny_config())
    plain = TransformersEngine(str(tiny_model), dtype="float32").generate(CHATS, max_new_tokens=8)
    merged = TransformersEngine(str(tiny_model), adapter=folder.model("teacher").adapter, dtype="float32").generate(CHATS, max_new_tokens=8)
    assert plain != merged


def test_engine_answers_several_threads(engine):
    made = {}

    def ask(i):
        made[i] = engine.generate([CHATS[i]], max_new_tokens=6)[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(CHATS))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [made[i] for i in range(len(CHATS))] == engine.generate(CHATS, max_new_tokens=6)


def test_a_chat_that_the_template_refuses_says_why(tiny_model):
    picky = TransformersEngine(str(tiny_model), dtype="float32")
    picky.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatRefused, match="roles must alternate"):
        picky.generate(CHATS, max_new_tokens=2)


def test_nothing_in_nothing_out(engine):
    assert engine.generate([], max_new_tokens=3) == []
    assert isinstance(engine.generate([CHATS[0]], max_new_tokens=1)[0], Completion)
