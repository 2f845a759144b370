"""`raystill judge` on a real cluster: the offline judge, a language model over HTTP, and a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from itertools import pairwise

import pytest
from judge_server import Fault, JudgeServer, completion, error, opinion

from ray_jobs import judge, report
from ray_jobs.__main__ import main
from ray_jobs.core.config_file import validate
from ray_jobs.core.errors import ClusterError, ConfigChanged, ConfigError, DataError, ModelError, StageHeld, StageMissing
from ray_jobs.core.records import Answer, Question, Similarity, Verdict, content_id
from ray_jobs.core.run_folder import RunFolder
from ray_jobs.core.run_lock import RunLock
from ray_jobs.judging.ledger import Ledger

pytestmark = pytest.mark.cluster
COURSE = [
    ("What is paging?", "Paging divides memory into pages of equal size. A page table maps each page to a frame.", "en"),
    ("What is a lock?", "A lock lets one thread into a critical section. Others wait until it is released.", "en"),
    ("What is big data?", "Big data is too large for one machine. It is stored and processed on many.", "en"),
    ("Was ist ein Prozess?", "Ein Prozess ist ein laufendes Programm mit eigenem Adressraum. Der Kern verwaltet ihn.", "de"),
]
MODELS = ("base", "teacher")


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A function that writes a run with questions and answers, and returns the Config that judges it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    def make(*, num_copies=1, num_questions=None, name="r", is_mixed=False, models=MODELS, **section):
        tree = {
            "run": {"name": name, "storage": str(tmp_path)},
            "answer": {"models": list(models)},
            "judge": {"pairs": [list(pair) for pair in pairwise(models)], **section},
            "workers": {"cpus": 1, "memory": "4GiB"},
        }
        config = validate(tree)
        folder = RunFolder(config)
        if not folder.folder("answer").exists("manifest.json"):
            _write(folder, num_copies, is_mixed, num_questions)
        return config

    return make


def _write(folder, num_copies, is_mixed, num_questions):
    questions = [
        Question(question_id=content_id(text, copy), question=f"{text} ({copy})", reference=reference, language=language)
        for copy in range(num_copies)
        for text, reference, language in COURSE
    ][:num_questions]
    stage = folder.stage("prepare", sections=["data"], after=[], force=False)
    stage.folder.write_jsonl("questions.jsonl", [question.model_dump() for question in questions])
    stage.finish()
    _answer(folder, questions, MODELS, is_mixed=is_mixed)


def _answer(folder, questions, models, *, is_mixed=False, force=False):
    stage = folder.stage("answer", sections=["answer"], after=["prepare"], force=force)
    for model in models:
        rows = []
        for i, question in enumerate(questions):
            first, second = question.reference.split(". ")
            is_short = (model == "base") != (is_mixed and i % 2 == 1)
            text = f"{first}." if is_short else f"{first}. {second} This is answer {i}{' of the student' * (model == 'student')}."
            answer_id = content_id(question.question_id, model)
            rows.append(
                Answer(answer_id=answer_id, question_id=question.question_id, model=model, text=text, finish_reason="stop").model_dump()
            )
        stage.folder.write_parquet(f"{model}.parquet", rows)
    stage.finish()


def read(config, name):
    return RunFolder(config).folder("judge").read_parquet(name)


def openai(server, **options):
    return {"judges": ["openai"], "canaries": 0, "openai": {"model": "stub-1", "base_url": server.url, "max_concurrency": 4, **options}}


def test_the_offline_judge_writes_rows_of_the_contract_and_is_done_once(ray_cluster, make_run):
    config = make_run()
    manifest = judge.run(config, force=False)
    verdicts = [Verdict(**row) for row in read(config, "verdicts.parquet")]
    similarities = [Similarity(**row) for row in read(config, "similarities.parquet")]
    assert len(verdicts) == len(COURSE) * 2 and len(similarities) == len(COURSE) * 2
    assert {row.winner for row in verdicts} == {"b"} and {row.judge for row in verdicts} == {"coverage"}
    assert all("answer 2 covers 2" in row.explanation for row in verdicts)
    assert [row.cosine is None for row in similarities] == [False, False, False, True] * 2  # the German question
    assert "answer's words have a vector, fewer than" in similarities[3].reason
    [pair] = manifest["pairs"]
    assert [pair["win_rates"]["coverage"][key] for key in ("wins_a", "wins_b", "ties", "unscored")] == [0, 4, 0, 0]
    assert sum(pair["win_rates"]["similarity"][key] for key in ("wins_a", "wins_b", "ties")) == 3
    assert pair["win_rates"]["similarity"]["unscored"] == 1
    assert any("2 of 8 answers have no similarity" in line for line in manifest["headline"])
    assert judge.run(config, force=False)["id"] == manifest["id"]
    with pytest.raises(ConfigChanged, match=r"judge\.coverage_margin"):
        judge.run(make_run(coverage_margin=0.2), force=False)


@pytest.mark.parametrize("number", [0, 1])
def test_no_question_and_a_single_one_are_judged_and_reported_without_a_division_by_zero(ray_cluster, make_run, number):
    with JudgeServer().running() as server:
        config = make_run(num_questions=number, **{**openai(server), "judges": ["coverage", "openai"], "canaries": 2})
        manifest = judge.run(config, force=False)
        assert len(server.requests) == 4 * number
    assert manifest["counts"]["verdicts"] == 4 * number and manifest["counts"]["similarities"] == 2 * number
    told = report.run(config, force=False)
    assert told["counts"]["questions"] == number and told["counts"]["comparisons"] == 2 * number


def test_a_language_model_judges_both_orders_and_another_reading_or_a_third_model_pays_for_what_is_new_alone(ray_cluster, make_run):
    fault = Fault(500, error("broken"), {"retry-after-ms": "1"})

    def one_row_breaks(_, request):
        prompt = request["messages"][1]["content"]
        return fault if "big data" in prompt and prompt.index("answer 2.") < prompt.index("<answer_b") else None

    with JudgeServer(one_row_breaks).running() as server:
        config = make_run(**openai(server, usd_per_million_prompt_tokens=1.0, usd_per_million_completion_tokens=2.0))
        manifest = judge.run(config, force=False)
        verdicts = [Verdict(**row) for row in read(config, "verdicts.parquet")]
        assert [row.winner for row in verdicts] == ["b", "b", "b", "b", "b", None, "b", "b"]
        assert verdicts[5].swapped and "no reply: Error code: 500" in verdicts[5].unscored
        assert verdicts[1].explanation.startswith("Between answer 2 and answer 1, A is longer.")
        assert json.loads(verdicts[0].raw)["usage"]["prompt_tokens"] == 100
        assert (verdicts[0].judge, verdicts[0].cost_usd) == ("openai:stub-1", pytest.approx(200e-6))
        [pair] = manifest["pairs"]
        assert [pair["win_rates"]["openai:stub-1"][key] for key in ("wins_a", "wins_b", "ties", "unscored")] == [0, 3, 0, 1]
        num_calls = len(server.requests)
        server.fault = lambda number, request: None
        again = judge.run(config, force=True)
        assert len(server.requests) == num_calls + 1  # the failed one alone
        assert again["judges"][0]["calls"]["cached"] == 7
        assert {row["winner"] for row in read(config, "verdicts.parquet")} == {"b"}
        _as_an_older_version_read_the_replies(config)
        with pytest.raises(DataError, match=r"schema version 0.*make its stage anew with --force"):
            report.run(config, force=False)
        anew = judge.run(config, force=True)
        assert {row["winner"] for row in read(config, "verdicts.parquet")} == {"b"}
        calls = anew["judges"][0]["calls"]
        assert (calls["cached"], calls["sent"], calls["usd"]) == (8, 0, 0.0)
        assert len(server.requests) == num_calls + 1  # another reading of what is kept
        prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}
        third = make_run(models=(*MODELS, "student"), **openai(server, **prices))
        questions = [Question(**row) for row in RunFolder(third).folder("prepare").read_jsonl("questions.jsonl")]
        _answer(RunFolder(third), questions, third.answer.models, force=True)
        more = judge.run(third, force=True)["judges"][0]
    assert (more["calls"]["cached"], more["calls"]["sent"]) == (8, 2 * len(COURSE))
    new = [request["messages"][1]["content"] for request in server.requests[num_calls + 1 :]]
    assert len(new) == 2 * len(COURSE) and all("of the student" in prompt for prompt in new)


def _as_an_older_version_read_the_replies(config):
    folder = RunFolder(config).folder("judge")
    unread = {"schema_version": 0, "winner": None, "explanation": "", "unscored": "no verdict in the reply"}
    folder.write_parquet("verdicts.parquet", [row | unread for row in folder.read_parquet("verdicts.parquet")])


def test_a_driver_interrupted_then_killed_at_25_50_and_75_percent_pays_again_only_for_what_a_kill_lost(ray_cluster, make_run, tmp_path):
    in_flight = 4
    with JudgeServer(latency_s=0.1).running() as server:
        config = make_run(num_copies=25, **openai(server, max_concurrency=in_flight))
        num_calls = 25 * len(COURSE) * 2
        command = [sys.executable, "-m", "ray_jobs", "judge", _file(tmp_path, server, max_concurrency=in_flight)]
        with subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True) as driver:
            _wait_until(lambda: len(server.requests) >= num_calls // 8, timeout_s=120)
            driver.send_signal(signal.SIGTERM)
            assert driver.communicate()[1].endswith("raystill: interrupted; the same command goes on from here\n")
        assert driver.returncode == 130
        spent = Ledger(RunFolder(config).storage.sub("replies")).spent()
        assert num_calls // 8 <= spent.calls == len(server.requests) < num_calls // 4 and not spent.unanswered
        for quarter in (1, 2, 3):
            driver = subprocess.Popen(command, env=os.environ)
            try:
                _wait_until(lambda reached=quarter * num_calls // 4: len(server.requests) >= reached, timeout_s=120)
            finally:
                driver.send_signal(signal.SIGKILL)
                driver.wait()
            _wait_until_quiet(server)
        assert len(server.requests) < num_calls
        judge.run(config, force=False)
        assert num_calls <= len(server.requests) <= num_calls + 3 * in_flight
        whole = make_run(name="whole", num_copies=25, **openai(server, max_concurrency=in_flight))
        judge.run(whole, force=False)
    assert read(config, "verdicts.parquet") == read(whole, "verdicts.parquet")
    assert read(config, "similarities.parquet") == read(whole, "similarities.parquet")
    tables = []
    for each in (config, whole):
        report.run(each, force=False)
        told = RunFolder(each).folder("report").read_json("report.json")
        tables.append([told[key] for key in ("answer", "matches", "agreement", "judges")])
    assert tables[0] == tables[1]


def test_a_spent_budget_leaves_a_part_and_a_larger_one_pays_the_rest(ray_cluster, make_run):
    with JudgeServer().running() as server:
        config = make_run(num_copies=5, max_calls=12, **openai(server))
        manifest = judge.run(config, force=False)
        rows = read(config, "verdicts.parquet")
        assert len(server.requests) == 12 == sum(row["winner"] is not None for row in rows)
        assert all(row["unscored"].startswith("not asked: the budget of 12 calls") for row in rows if row["winner"] is None)
        assert manifest["judges"][0]["coverage"] == {"games": 40, "asked": 12, "share": 0.3}
        assert any("was asked 12 of 40 games (30%)" in line for line in manifest["headline"])
        report.run(config, force=False)
        assert any("was asked about" in line for line in RunFolder(config).folder("report").read_json("report.json")["sentences"])
        assert judge.run(config, force=False)["id"] == manifest["id"]
        whole = judge.run(make_run(num_copies=5, max_calls=100, **openai(server)), force=False)
        assert len(server.requests) == 40
    assert whole["judges"][0]["coverage"]["share"] == 1.0 and whole["budget"]["stopped"] == []
    assert all(row["winner"] for row in read(config, "verdicts.parquet"))


def _file(folder, server, *, max_concurrency=4):
    """Write the config of `make_run(**openai(server))` and return its name."""
    file = folder / "config.toml"
    file.write_text(
        f'[run]\nname = "r"\nstorage = "{folder}"\n[answer]\nmodels = ["base", "teacher"]\n[workers]\ncpus = 1\n'
        f'[judge]\npairs = [["base", "teacher"]]\njudges = ["openai"]\ncanaries = 0\n'
        f'[judge.openai]\nmodel = "stub-1"\nbase_url = "{server.url}"\nmax_concurrency = {max_concurrency}\n'
    )
    return str(file)


def _wait_until(condition, *, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _wait_until_quiet(server):
    seen = -1
    while seen != len(server.requests):
        seen = len(server.requests)
        time.sleep(2)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(401, "invalid_api_key", "Incorrect API key"), (404, "model_not_found", "The model stub-1 does not exist")],
)
def test_a_wrong_key_or_model_is_one_call_one_line_and_no_manifest(ray_cluster, make_run, tmp_path, capsys, status, code, message):
    with JudgeServer(lambda number, _: Fault(status, error(message, code))).running() as server:
        config = make_run(**openai(server))
        assert main(["judge", _file(tmp_path, server)]) == 2
    assert len(server.requests) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.endswith(f"Error code: {status} - {message}; replies so far are kept: run the same command again\n")
    assert said.splitlines()[-1].startswith(f"raystill: judge openai:stub-1: {server.url} cannot be asked: ")
    assert not RunFolder(config).folder("judge").exists("manifest.json")


def _simulated(_, request):
    """Judges that mind the place, nothing, or chance; `longer` is the server's own."""
    words = {"first": "A", "tie": "tie", "chance": "AB"[zlib.crc32(request["messages"][1]["content"].encode()) % 2]}
    word = words.get(request["model"])
    return Fault(body=completion(opinion(word, reasoning="Antwort A nennt mehr."))) if word else None


def test_simulated_judges_are_unusable_people_calibrate_them_and_nothing_is_paid_twice(ray_cluster, make_run, tmp_path):
    names = ["first", "longer", "tie", "chance"]
    with JudgeServer(_simulated).running() as server:
        tables = {name: {"model": name, "base_url": server.url, "max_concurrency": 16} for name in [*names, "late"]}
        questions = RunFolder(make_run(num_copies=10, is_mixed=True)).folder("prepare").read_jsonl("questions.jsonl")
        labels = tmp_path / "human_labels.csv"
        lines = [f"{question['question_id']},teacher,base,teacher\n" for question in questions[::2]]
        labels.write_text("".join(["question_id,model_a,model_b,winner\n", *lines]))
        section = {"jury": tables, "canaries": 1, "imports": {"human": str(labels)}}
        config = make_run(judges=names, **section)
        manifest = judge.run(config, force=False)
        assert len(server.requests) == 4 * (2 * len(questions) + 1)
        cards = {entry["name"]: entry["card"] for entry in manifest["judges"]}
        told = {name: "; ".join(cards[f"{name}:{name}"]["usability"]["reasons"]) for name in names}
        assert {cards[f"{name}:{name}"]["usability"]["word"] for name in names} == {"unusable"}
        assert "the answer read first wins 100%" in told["first"] and "it measures length" in told["longer"]
        assert "100% of the games a tie" in told["tie"] and "not shown to agree better than chance" in told["chance"]
        assert cards["longer:longer"]["human"]["num"] == len(questions) // 2 and cards["human"]["usability"]["word"] == "usable"
        [pair] = manifest["pairs"]
        assert pair["jury"]["num"] == len(questions) and sum(pair["win_rates"]["jury"][key] for key in ("wins_a", "wins_b", "ties")) == 40
        assert {row["kind"] for row in RunFolder(config).folder("judge").read_jsonl("canaries.jsonl")} == {"order"}
        report.run(config, force=False)
        page = RunFolder(config).folder("report").read_json("report.json")
        words = {entry["judge"]: entry["card"]["usability"]["word"] for entry in page["judges"]}
        assert "jury" in words and set((words | {"human": "unusable"}).values()) == {"unusable"}
        before = len(server.requests)
        judge.run(make_run(judges=names, **section, tie_band=0.2, coverage_margin=0.2), force=True)
        assert len(server.requests) == before  # other metrics, the same calls
        more = judge.run(make_run(judges=[*names, "late"], **section), force=True)
        assert len(server.requests) == before + 2 * len(questions) + 1
        assert more["jury"] == [*(f"{name}:{name}" for name in names), "late:late"]


def test_a_model_of_our_own_judges_without_a_key_and_once(ray_cluster, make_run, tiny_model, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    config = make_run(judges=["own"], canaries=1, jury={"own": {"local": str(tiny_model), "max_tokens": 8}})
    manifest = judge.run(config, force=False)
    rows = [Verdict(**row) for row in read(config, "verdicts.parquet")]
    assert len(rows) == 2 * len(COURSE) and {row.judge for row in rows} == {f"own:{tiny_model}"}
    assert all(row.winner is None and row.unscored and json.loads(row.raw)["object"] == "chat.completion" for row in rows)
    assert all(row.cost_usd == 0 and row.completion_tokens for row in rows)
    [entry] = manifest["judges"]
    assert entry["card"]["usability"]["word"] == "unusable" and entry["calls"]["sent"] == 9
    again = judge.run(config, force=True)["judges"][0]["calls"]
    assert (again["cached"], again["sent"]) == (9, 0)


def test_workers_that_fit_nowhere_are_refused_at_once(ray_cluster, make_run):
    config = make_run()
    config = config.model_copy(update={"workers": config.workers.model_copy(update={"cpus": 64.0})})
    with pytest.raises(ClusterError, match=r"judge needs 1 x \(64 CPUs"):
        judge.run(config, force=False)


def nothing_written(config):
    return not RunFolder(config).folder("judge").exists("started.json")


def test_no_key_is_said_before_anything(make_run, monkeypatch):
    config = make_run(judges=["coverage", "openai"])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY, which is not set"):
        judge.run(config, force=False)
    assert nothing_written(config)


@pytest.mark.parametrize(
    ("section", "error_type", "message"),
    [
        ({"vectors": "no-such-file.txt"}, ModelError, "no built-in name"),
        ({"coverage_model": "no/such-model"}, ModelError, "no/such-model"),
        ({"pairs": [["base", "student"]]}, ConfigError, "pairs name 'student', but"),
        ({"pairs": []}, ConfigError, "pairs is empty"),
        ({"pairs": [["base", "base"]]}, ConfigError, "'base' meet itself"),
    ],
)
def test_bad_settings_write_nothing(make_run, section, error_type, message):
    config = make_run(**section)
    with pytest.raises(error_type, match=message):
        judge.run(config, force=False)
    assert nothing_written(config)


def test_a_judge_stage_that_another_process_works_on_is_refused(make_run):
    config = make_run()
    run = RunFolder(config).storage
    lock = RunLock(run, "judge")
    theirs = {**run.read_json("judge.lock"), "machine": "another", "token": "theirs"}
    lock.release()
    run.write_json("judge.lock", theirs)
    with pytest.raises(StageHeld, match=r"stage 'judge' of .* is worked on by process"):
        judge.run(config, force=False)
    assert nothing_written(config)


def test_other_vectors_of_the_same_name_are_refused(make_run):
    config = make_run()
    before = {"vectors_sha256": "of another file", "imports": {}}
    RunFolder(config).stage("judge", sections=judge.deciding(config.judge), after=judge.AFTER, force=False, facts=before)
    with pytest.raises(ConfigChanged, match=r"vectors_sha256: 'of another file' ->"):
        judge.run(config, force=False)


def test_answers_of_other_questions_are_refused(make_run):
    config = make_run()
    folder = RunFolder(config).folder("prepare")
    folder.write_jsonl("questions.jsonl", folder.read_jsonl("questions.jsonl")[1:])
    with pytest.raises(DataError, match="do not belong together"):
        judge.run(config, force=False)
    assert nothing_written(config)


def test_no_answers_yet(tmp_path):
    config = validate({"run": {"name": "empty", "storage": str(tmp_path)}})
    with pytest.raises(StageMissing, match="'prepare' has not finished"):
        judge.run(config, force=False)
