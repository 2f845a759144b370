"""prepare on a real cluster: every kind of input, what is dropped and why, the packed rows, and a kill in the middle."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs import prepare
from ray_jobs.core.errors import ConfigChanged, DataError, JobError, ModelError
from ray_jobs.core.storage import Storage
from ray_jobs.corpus.packing import IGNORE
from ray_jobs.corpus.ray_data import each

pytestmark = pytest.mark.cluster
WORDS = "kernel page frame inode lock thread cache disk queue table".split()


def sentence(number):
    who, what, why = (WORDS[place % 10] for place in (number, number // 10, number // 3))
    return f"The {who} number {number} holds {what} entries of level {number * 7} for the {why}."


def jsonl(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Documents and pairs of every format, with one of each thing that goes wrong."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "docs").mkdir()
    sections = "".join(f"\n## Part {n}\n\n{' '.join(sentence(n * 20 + i) for i in range(12))}\n" for n in range(6))
    (folder / "docs" / "a.md").write_text(f"# Course\n{sections}")
    (folder / "docs" / "b.txt").write_text(f"Course\n======\n{sections}".replace("number 3 ", "number 4 "))
    (folder / "docs" / "c.html").write_text(f"<nav>Home</nav><h1>Web</h1><p>{' '.join(sentence(500 + i) for i in range(8))}</p>")
    (folder / "docs" / "d.pdf").write_bytes(b"%PDF-1.4 torn")
    (folder / "docs" / "e.png").write_bytes(b"\x89PNG")
    pairs = [{"question": f"What does unit {n} hold?", "answer": f"{sentence(n)} {sentence(n + 100)}", "topic": "units"} for n in range(30)]
    too_long = {"question": "What holds everything?", "answer": " ".join(map(sentence, range(40)))}
    asked = {"question": "What is a kernel?", "reference": "The kernel is the core. It runs in a privileged mode."}
    leaked = {"question": "what is a KERNEL", "answer": "Something else that is not the sample answer."}
    (folder / "pairs.jsonl").write_text(jsonl([*pairs[:10], "{torn", {"question": "Q?"}, too_long, leaked, pairs[0]]))
    (folder / "pairs.csv").write_text(
        "question,answer,topic\n" + "".join(f"{p['question']},{p['answer']},{p['topic']}\n" for p in pairs[10:20])
    )
    pq.write_table(pa.Table.from_pylist(pairs[20:]), folder / "pairs.parquet")
    (folder / "questions.jsonl").write_text(jsonl([asked]))
    return folder


@pytest.fixture
def config(course, tiny_config):
    def make(**overrides):
        given = {
            "data__documents": [f"{course}/docs"],
            "data__pairs": [f"{course}/pairs.*"],
            "data__questions": f"{course}/questions.jsonl",
            "data__max_length": 192,
            "data__chunk_tokens": 128,
        }
        return tiny_config(**{**given, **overrides})

    return make


def folder_of(config):
    return Storage(config.run.storage).sub(config.run.name).sub("prepare")


def files(folder):
    names = ["chunks.parquet", "pairs.jsonl", "questions.jsonl", "train/000000.parquet", "eval/000000.parquet"]
    return {name: folder.read_bytes(name) for name in names}


@pytest.fixture(scope="module")
def prepared(ray_cluster, course, tiny_model, tmp_path_factory):
    """(config, manifest) of one undisturbed run."""
    from ray_jobs.core.config_file import validate

    config = validate(
        {
            "run": {"name": "tiny", "storage": str(tmp_path_factory.mktemp("runs"))},
            "teacher": {"model": str(tiny_model)},
            "data": {
                "documents": [f"{course}/docs"],
                "pairs": [f"{course}/pairs.*"],
                "questions": f"{course}/questions.jsonl",
                "max_length": 192,
                "chunk_tokens": 128,
            },
        }
    )
    return config, prepare.run(config, force=False)


def test_everything_is_kept_or_dropped_with_a_reason(prepared):
    config, manifest = prepared
    counts, folder = manifest["counts"], folder_of(config)
    assert counts["documents"] == 3 and counts["pairs"] == 30 and counts["questions"] == 1
    dropped = folder.read_jsonl("dropped.jsonl")
    assert counts["dropped"]["broken row"] == 2 and counts["dropped"]["too long"] == 1
    assert counts["dropped"]["unreadable document"] == counts["dropped"]["unsupported file"] == counts["dropped"]["boilerplate"] == 1
    assert counts["dropped"]["evaluation question"] == 1
    repeats = [item["what"] for item in dropped if item["reason"] == "near-duplicate"]
    assert any("pairs.jsonl line 15" in what for what in repeats) and any("b.txt" in what for what in repeats)
    assert any("pairs.jsonl line 11: not JSON" in item["what"] for item in dropped)
    assert any("d.pdf: not a readable PDF" in item["what"] for item in dropped)
    assert sum(item["num"] for item in dropped) == sum(counts["dropped"].values())
    assert "1 evaluation question" in manifest["headline"][0]
    assert not folder.exists(prepare.PARTS)


def test_the_tables_are_what_the_counts_say(prepared):
    config, manifest = prepared
    counts, folder = manifest["counts"], folder_of(config)
    chunks = folder.read_parquet("chunks.parquet")
    assert len(chunks) == counts["chunks"] and len({chunk["chunk_id"] for chunk in chunks}) == len(chunks)
    assert set(chunks[0]) == {"chunk_id", "document", "heading", "text", "num_tokens", "language"}
    assert max(chunk["num_tokens"] for chunk in chunks) <= 128
    assert len(folder.read_jsonl("pairs.jsonl")) == counts["pairs"]
    assert [question["question"] for question in folder.read_jsonl("questions.jsonl")] == ["What is a kernel?"]


def test_packed_rows_hold_each_example_whole(prepared, tiny_model):
    from transformers import AutoTokenizer

    config, manifest = prepared
    counts, folder = manifest["counts"], folder_of(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    segments = []
    for split in ("train", "eval"):
        rows = folder.read_parquet(f"{split}/000000.parquet")
        assert len(rows) == counts[f"{split}_rows"] > 0
        for row in rows:
            assert sum(row["segment_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 192
            assert all(label in (IGNORE, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
            for start, length in zip([0, *_sums(row["segment_lengths"])], row["segment_lengths"], strict=False):
                segments.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
    assert all(labels[0] == IGNORE for _, labels in segments)
    texts = [tokenizer.decode(ids) for ids, _ in segments]
    expected = [f"{chunk['heading']}\n\n{chunk['text']}" for chunk in folder.read_parquet("chunks.parquet")]
    assert sorted(text for text in texts if not text.startswith("<|im_start|>")) == sorted(expected)
    trained = [tokenizer.decode([label for label in labels if label != IGNORE]) for _, labels in segments]
    answers = [pair["answer"] + "<|im_end|>" for pair in folder.read_jsonl("pairs.jsonl")]
    assert sorted(text for text in trained if text.endswith("<|im_end|>")) == sorted(answers)
    assert counts["train_tokens"] + sum(len(r["input_ids"]) for r in folder.read_parquet("eval/000000.parquet")) == sum(
        len(s) for s, _ in segments
    )
    assert counts["label_tokens"] + counts["eval_label_tokens"] == sum(label != IGNORE for _, labels in segments for label in labels)


def test_each_segment_names_the_file_it_comes_from(prepared, tiny_model):
    from transformers import AutoTokenizer

    config, manifest = prepared
    folder, tokenizer = folder_of(config), AutoTokenizer.from_pretrained(tiny_model)
    documents = {f"{row['heading']}\n\n{row['text']}": row["document"] for row in folder.read_parquet("chunks.parquet")}
    found = {}
    for split in ("train", "eval"):
        for row in folder.read_parquet(f"{split}/000000.parquet"):
            starts = [0, *_sums(row["segment_lengths"])]
            for source, (start, end) in zip(row["segment_sources"], itertools.pairwise(starts), strict=True):
                text = tokenizer.decode(row["input_ids"][start:end])
                assert source == documents.get(text, source) and ("/pairs." in source) == (text not in documents)
                counts = found.setdefault(source, {"train_tokens": 0, "label_tokens": 0, "eval_label_tokens": 0})
                counts["train_tokens"] += (end - start) * (split == "train")
                labels = sum(label != IGNORE for label in row["labels"][start:end])
                counts["label_tokens" if split == "train" else "eval_label_tokens"] += labels
    listed = manifest["sources"]
    assert list(listed) == sorted(found)
    assert {name: {key: counts[key] for key in found[name]} for name, counts in listed.items()} == found
    assert all(1 <= counts["train_rows"] <= manifest["counts"]["train_rows"] for counts in listed.values() if counts["train_tokens"])


def _sums(lengths):
    total = 0
    for length in lengths:
        total += length
        yield total


def test_a_finished_stage_is_not_run_again(prepared):
    config, manifest = prepared
    start = time.monotonic()
    assert prepare.run(config, force=False)["id"] == manifest["id"]
    assert time.monotonic() - start < 5


def test_killed_and_run_again_gives_the_same_files(prepared, config, tmp_path):
    undisturbed = files(folder_of(prepared[0]))
    again = config()
    path = tmp_path / "run.json"
    path.write_text(again.model_dump_json())
    code = (
        "import sys; from ray_jobs.core.config import Config; from ray_jobs import prepare; "
        "prepare.run(Config.model_validate_json(open(sys.argv[1]).read()), force=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=os.environ | {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]})
    parts = folder_of(again).sub(prepare.PARTS)
    deadline = time.monotonic() + 90
    while not any(name.endswith(".json") for name in parts.names()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = next(name for name in parts.names() if name.endswith(".json"))
    mark = parts.read_json(finished)
    parts.write_json(finished, {**mark, "dropped": [*mark["dropped"], ["planted", "by the test", 1]]})
    manifest = prepare.run(again, force=False)
    assert files(folder_of(again)) == undisturbed
    assert manifest["counts"]["dropped"].pop("planted") == 1  # the finished unit was taken as it was
    assert manifest["counts"] == prepared[1]["counts"]


def test_a_changed_file_is_refused(prepared, course):
    config, _ = prepared
    before = (course / "questions.jsonl").read_text()
    (course / "questions.jsonl").write_text(before + jsonl([{"question": "New?", "reference": "Yes."}]))
    try:
        with pytest.raises(ConfigChanged, match=r"questions\.jsonl"):
            prepare.run(config, force=False)
    finally:
        (course / "questions.jsonl").write_text(before)


def test_a_run_where_nothing_is_left_stops(ray_cluster, config, course):
    broken = config(data__documents=[f"{course}/docs/d.pdf"], data__pairs=[])
    with pytest.raises(
        DataError, match=r"nothing is left to train on of 1 files \(1 unreadable document; first: .*d\.pdf: not a readable PDF"
    ):
        prepare.run(broken, force=False)
    assert not folder_of(broken).exists("started.json")


def test_a_template_that_cannot_be_trained_on_is_one_clear_error(ray_cluster, config, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    changing = "{% for m in messages %}{{ m.role + (messages | length | string) + m.content }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(changing)
    odd = config(teacher__model=str(tmp_path / "model"))
    with pytest.raises(ModelError, match="writes another prompt"):
        prepare.run(odd, force=False)
    assert not folder_of(odd).exists("started.json")


def test_a_model_writes_pairs_from_chunks(ray_cluster, config, course, tiny_model):
    asked = config(data__documents=[f"{course}/docs/c.html"], data__pairs=[], data__pairs_per_chunk=2, data__pair_writer=str(tiny_model))
    counts = prepare.run(asked, force=False)["counts"]
    # the tiny model is random: what it writes is noise, counted and named
    assert counts["pairs"] + counts["dropped"]["unusable written pair"] == 2 * counts["chunks"] > 0


def test_workers_that_die_each_time_are_one_line(ray_cluster):
    class Dying:  # nested: sent by value, as workers cannot import the tests
        def __call__(self, item):
            os._exit(1)

    with pytest.raises(JobError, match=r"^pool of Dying: a worker died 4 times(?!.*ModuleNotFound)"):
        list(each([{"unit": "a"}], Dying, {}, bundle={"CPU": 1.0}, num_workers=1))
