"""A stage is skipped when finished, goes on when not, refuses other settings, starts anew when asked or fed anew."""

import pytest

from ray_jobs import distill
from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ConfigChanged, StageMissing, StorageError
from ray_jobs.core.run_folder import RunFolder, clear_stage
from ray_jobs.core.storage import Storage


def run_folder(storage, name="r", **sections):
    run = {"name": name, "storage": str(storage), **sections.pop("run", {})}
    return RunFolder(validate({"run": run, **sections}))


def prepare(folder, *, force=False, facts=None):
    return folder.stage("prepare", sections=["data"], after=[], force=force, facts=facts)


def finetune(folder, *, force=False):
    return folder.stage("finetune", sections=["finetune"], after=["prepare"], force=force)


def test_a_finished_stage_is_recognised_with_its_facts(tmp_path):
    manifest = prepare(run_folder(tmp_path)).finish(counts={"pairs": 3})
    assert manifest["counts"] == {"pairs": 3}
    assert manifest["settings"]["data.max_length"] == 512
    assert manifest["seconds"] >= 0
    assert manifest["driver_peak_bytes"] > 10**6
    assert prepare(run_folder(tmp_path)).manifest == manifest


def test_an_unfinished_stage_keeps_what_it_has_written(tmp_path):
    prepare(run_folder(tmp_path)).folder.write_bytes("part", b"x")
    again = prepare(run_folder(tmp_path))
    assert again.manifest is None
    assert again.folder.read_bytes("part") == b"x"


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_fields_that_differ(tmp_path, finished):
    stage = prepare(run_folder(tmp_path))
    if finished:
        stage.finish()
    with pytest.raises(ConfigChanged, match=r"data\.max_length: 512 -> 256.*--force") as caught:
        prepare(run_folder(tmp_path, data={"max_length": 256}))
    assert caught.value.exit_code == 2


def test_settings_of_other_sections_do_not_matter_but_the_seed_and_the_facts_do(tmp_path):
    prepare(run_folder(tmp_path), facts={"files": {"notes.md": "abc"}}).finish()
    assert prepare(run_folder(tmp_path, finetune={"learning_rate": 1}), facts={"files": {"notes.md": "abc"}}).manifest
    with pytest.raises(ConfigChanged, match=r"files\.notes\.md: 'abc' -> 'xyz'"):
        prepare(run_folder(tmp_path), facts={"files": {"notes.md": "xyz"}})
    with pytest.raises(ConfigChanged, match=r"run\.seed: 0 -> 1"):
        prepare(run_folder(tmp_path, run={"seed": 1}), facts={"files": {"notes.md": "abc"}})


def test_many_differences_are_counted_not_listed(tmp_path):
    prepare(run_folder(tmp_path)).finish()
    other = {
        "max_length": 256,
        "chunk_tokens": 64,
        "eval_share": 0.2,
        "near_duplicate": 0.5,
        "system_prompt": "x",
        "train_on_chunks": False,
    }
    with pytest.raises(ConfigChanged, match="and 1 more"):
        prepare(run_folder(tmp_path, data=other))


def test_force_starts_anew_and_leaves_nothing_of_before(tmp_path):
    stage = prepare(run_folder(tmp_path))
    stage.folder.write_bytes("part", b"x")
    stage.finish()
    anew = prepare(run_folder(tmp_path, data={"max_length": 256}), force=True)
    assert anew.manifest is None
    assert anew.folder.names() == ["started.json"]


@pytest.mark.parametrize("left", ["result.json", "manifest.json"])
def test_what_lies_in_a_stage_that_never_started_is_cleared(tmp_path, left):
    stage = prepare(run_folder(tmp_path))
    stage.folder.write_json(left, {})
    stage.folder.delete("started.json")
    again = prepare(run_folder(tmp_path))
    assert again.manifest is None
    assert again.folder.names() == ["started.json"]


@pytest.mark.parametrize("forced", [True, False])
def test_a_clearing_that_was_killed_is_finished_by_the_next_start(tmp_path, forced):
    stage = prepare(run_folder(tmp_path))
    for name in ("a.json", "b.json"):
        stage.folder.write_json(name, {})
    stage.finish()

    class Killed(Storage):
        def delete(self, name):
            if name == "b.json":
                raise KeyboardInterrupt
            super().delete(name)

    with pytest.raises(KeyboardInterrupt):
        clear_stage(Killed(stage.folder.uri))
    assert stage.folder.names() == ["b.json", "started.json"]
    again = prepare(run_folder(tmp_path, data={"max_length": 256}), force=forced)
    assert again.manifest is None
    assert again.folder.names() == ["started.json"]


def test_a_stage_that_came_to_nothing_takes_the_run_folder_along_only_where_it_is_alone(tmp_path):
    folder = run_folder(tmp_path)
    folder.discard(prepare(folder))
    assert list(tmp_path.iterdir()) == []
    prepare(folder).finish()
    folder.discard(finetune(folder))
    assert folder.storage.names() == ["config.json", "prepare"]


def test_a_stage_needs_those_before_it(tmp_path):
    prepare(run_folder(tmp_path))  # begun, not finished
    with pytest.raises(StageMissing, match=r"'prepare' has not finished.*raystill prepare"):
        finetune(run_folder(tmp_path))
    assert not (tmp_path / "r" / "finetune").exists()


def test_a_stage_starts_anew_when_an_earlier_one_was_made_anew(tmp_path):
    prepare(run_folder(tmp_path)).finish()
    finetune(run_folder(tmp_path)).finish()
    prepare(run_folder(tmp_path), force=True).finish()
    assert finetune(run_folder(tmp_path)).manifest is None


def test_answers_live_in_a_folder_of_their_own_name(tmp_path):
    folder = run_folder(tmp_path)
    folder.stage("answer", sections=["answer"], after=[], force=False).finish()
    assert (tmp_path / "r" / "answers" / "manifest.json").is_file()
    assert folder.finished("answer")["stage"] == "answer"


def test_a_run_reads_stages_of_other_runs_but_writes_its_own(tmp_path):
    first = prepare(run_folder(tmp_path)).finish()
    second = run_folder(tmp_path, "s", run={"stages_from": [str(tmp_path / "r")]})
    trained = finetune(second).finish()
    third = run_folder(tmp_path, "t", run={"stages_from": [str(tmp_path / "s"), str(tmp_path / "r")]})
    assert third.finished("prepare") == first
    assert third.finished("finetune") == trained
    assert third.folder("prepare").uri == str(tmp_path / "r" / "prepare")
    assert finetune(third).folder.uri == str(tmp_path / "t" / "finetune")
    assert second.finished("finetune") == trained


def test_config_json_holds_the_resolved_config_and_the_versions(tmp_path):
    folder = run_folder(tmp_path)
    prepare(folder)
    written = folder.storage.read_json("config.json")
    assert written["config"] == folder.config.model_dump(mode="json")
    assert {"raystill", "python", "ray", "torch", "transformers"} <= written["versions"].keys()


def test_a_storage_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be written.*\[run\] storage"):
        prepare(run_folder(tmp_path / "file"))


def test_the_teacher_is_base_and_adapter_or_a_folder_of_its_own(tmp_path):
    prepare(run_folder(tmp_path)).finish()
    adapted = run_folder(tmp_path).model("teacher")
    assert adapted == ("smollm2-135m-instruct", f"{tmp_path}/r/finetune/adapter")
    full = {"finetune": {"method": "full"}}
    assert run_folder(tmp_path, **full).model("teacher") == (f"{tmp_path}/r/finetune/teacher", None)
    finetune(run_folder(tmp_path, **full)).finish()
    reader = run_folder(tmp_path, "reader", run={"stages_from": [f"{tmp_path}/r"]})
    assert reader.config.finetune.method == "lora"
    assert reader.model("teacher") == (f"{tmp_path}/r/finetune/teacher", None)  # how it was made, not how this run would


def test_merging_afterwards_is_no_other_setting(tmp_path):
    prepare(run_folder(tmp_path)).finish()
    manifest = finetune(run_folder(tmp_path)).finish()
    assert finetune(run_folder(tmp_path, finetune={"merge": True})).manifest == manifest
    with pytest.raises(ConfigChanged, match=r"finetune\.lora\.dora: False -> True"):
        finetune(run_folder(tmp_path, finetune={"merge": True, "lora": {"dora": True}}))


def test_of_a_cache_its_place_decides_nothing_and_what_it_rounds_to_does(tmp_path):
    def started_with(name, **cache):
        folder = run_folder(tmp_path, name, distill={"cache": cache})
        for start in (prepare, finetune):
            if not folder.storage.exists(f"{start.__name__}/manifest.json"):
                start(folder).finish()
        return distill.open_stage(folder, force=False)

    kept = {"folder": str(tmp_path / "one"), "keep": "top_k", "top_k": 32}
    for name in ("finished", "killed"):
        stage = started_with(name, **kept)
        stage.finish() if name == "finished" else stage.release()
        started_with(name, **kept | {"folder": "s3://two/cache", "budget": "1GiB"}).release()
        for changed in ({"top_k": 64}, {"keep": "hidden"}, {"dtype": "float16"}):
            with pytest.raises(ConfigChanged, match=f"distill.cache.{next(iter(changed))}"):
                started_with(name, **kept | changed)
        with pytest.raises(ConfigChanged, match=r"distill.cache.rounds: True -> None"):
            started_with(name, **kept | {"folder": None})
    exact = {"folder": str(tmp_path / "exact"), "dtype": "float32"}
    started_with("exact", **exact).release()
    started_with("exact", **exact | {"folder": None}).release()


def test_a_stage_is_due_until_it_is_finished_and_again_with_other_inputs_or_by_force(tmp_path):
    folder = run_folder(tmp_path)
    prepare(folder).finish()
    assert folder.is_due("finetune", after=["prepare"], force=False)
    finetune(folder).finish()
    assert not folder.is_due("finetune", after=["prepare"], force=False)
    assert folder.is_due("finetune", after=["prepare"], force=True)
    prepare(folder, force=True).finish()
    assert folder.is_due("finetune", after=["prepare"], force=False)


def test_another_runs_finished_stage_leaves_ones_own_due(tmp_path):
    first = run_folder(tmp_path)
    prepare(first).finish()
    finetune(first).finish()
    second = run_folder(tmp_path, name="s", run={"stages_from": [first.storage.uri]})
    assert second.is_due("finetune", after=["prepare"], force=False)
