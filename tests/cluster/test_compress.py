"""The compress job on a tiny run: table, resume without exporting again, exports held to parity."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs import compress
from ray_jobs.core.errors import ClusterError, DataError, StageMissing
from ray_jobs.core.run_folder import RunFolder

pytestmark = pytest.mark.cluster
VARIANTS = ["torch-int8", "openvino-fp32", "openvino-int8", "onnx-int8"]
SMALL = {"compress__num_questions": 2, "compress__new_tokens": 4, "compress__num_rows": 2, "compress__repetitions": 2}


def write_earlier_stages(config, tiny_model, *, eval_rows=3):
    """Finish prepare, finetune and distill with files of their contract, made directly."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = RunFolder(config)
    prepare = folder.stage("prepare", sections=[], after=[], force=False)
    ids = list(range(100, 164))
    row = {"row_id": "r", "input_ids": ids, "labels": [-100, *ids[1:40], -100, *ids[41:]], "segment_lengths": [40, 24]}
    prepare.folder.write_parquet("eval/part-0.parquet", [row] * eval_rows)
    questions = [{"question_id": str(i), "question": f"What is part {i} of a kernel?", "reference": "It is."} for i in range(5)]
    prepare.folder.write_jsonl("questions.jsonl", questions)
    prepare.finish(counts={"eval_rows": eval_rows})
    torch.manual_seed(0)
    finetune = folder.stage("finetune", sections=[], after=["prepare"], force=False)
    teacher = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    teacher.save_pretrained(Path(finetune.folder.uri) / "adapter")
    finetune.finish()
    distill = folder.stage("distill", sections=[], after=["finetune"], force=False)
    student = AutoModelForCausalLM.from_pretrained(tiny_model, num_hidden_layers=2)
    student.save_pretrained(Path(distill.folder.uri) / "student")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(Path(distill.folder.uri) / "student")
    distill.finish()
    return folder.folder("compress")


def test_table_of_all_rows_and_resume(ray_cluster, tiny_config, tiny_model):
    first = tiny_config(**SMALL, compress__variants=["openvino-fp32"])
    stage = write_earlier_stages(first, tiny_model)
    compress.run(first, force=False)
    kept = stage.root + "/openvino-fp32"
    before = {path.name: path.stat().st_mtime_ns for path in Path(kept).iterdir()}
    # what a killed driver leaves: one variant whole, one without its last file, no manifest
    config = tiny_config(**SMALL, compress__variants=VARIANTS)
    stage.delete("manifest.json")
    started = stage.read_json("started.json")
    stage.write_json("started.json", started | {"settings": started["settings"] | {"compress.variants": VARIANTS}})
    stage.write_bytes("openvino-int8/openvino_model.bin", b"torn")

    manifest = compress.run(config, force=False)

    assert {path.name: path.stat().st_mtime_ns for path in Path(kept).iterdir()} == before
    rows = {row["name"]: row for row in stage.read_json("table.json")}
    assert list(rows) == ["base", "teacher", "student", *VARIANTS]
    assert manifest["counts"] == {"variants": 4, "rows": 7}
    for name, row in rows.items():
        assert row["device"] == "cpu"
        assert row["threads"] == 1
        assert row["eval_tokens"] == 2 * (39 + 23)
        assert row["size_bytes"] > 0
        assert 0 < row["first_token_s"] < row["answer_p50_s"] <= row["answer_p95_s"]
        assert row["tokens_per_s"] == pytest.approx(4 / row["answer_p50_s"])
        assert (row["kl_nats"] is None) == (name in ("base", "teacher"))
    assert rows["student"]["kl_nats"] == 0
    assert rows["openvino-fp32"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert rows["openvino-fp32"]["loss_nats"] == pytest.approx(rows["student"]["loss_nats"], abs=1e-5)
    for name in VARIANTS:
        assert abs(rows[name]["loss_change_nats"]) < 0.01
    assert rows["teacher"]["loss_nats"] != pytest.approx(rows["base"]["loss_nats"], abs=1e-5)  # the adapter is in it
    assert rows["teacher"]["size_bytes"] > rows["base"]["size_bytes"] > rows["student"]["size_bytes"]
    assert all("student" in line and "nats" in line for line in manifest["headline"])
    assert len(manifest["headline"]) == 4
    assert json.loads(json.dumps(manifest)) == compress.run(config, force=False)


def test_no_held_out_text_is_refused_before_anything_is_written(tiny_config, tiny_model):
    config = tiny_config(**SMALL)
    stage = write_earlier_stages(config, tiny_model, eval_rows=0)
    with pytest.raises(DataError, match=r"held out 0 rows: raise data\.eval_share"):
        compress.run(config, force=False)
    assert stage.names() == []


def test_without_a_student_it_says_which_stage_is_missing(tiny_config):
    with pytest.raises(StageMissing, match="prepare"):
        compress.run(tiny_config(), force=False)


def test_more_than_any_node_has_is_refused_at_once(ray_cluster, tiny_config, tiny_model):
    config = tiny_config(**SMALL, workers__cpus=1000)
    write_earlier_stages(config, tiny_model)
    with pytest.raises(ClusterError, match=r"\[workers\] of compress needs 1 x \(1000 CPUs"):
        compress.run(config, force=False)


def test_held_out_rows_are_the_first_in_file_order(tiny_config, tiny_model):
    config = tiny_config(**SMALL)
    write_earlier_stages(config, tiny_model)
    folder = RunFolder(config)
    prepare = folder.folder("prepare")
    table = pa.table({"input_ids": [[7, 8]], "labels": [[-100, 8]], "segment_lengths": [[2]]})
    pq.write_table(table, f"{prepare.root}/eval/part--.parquet")
    work = compress.Work(config, folder.model("teacher"), prepare, prepare, prepare)
    segments = compress._held_out(work)
    assert segments[0].input_ids == [7, 8]
    assert len(segments) == 3
