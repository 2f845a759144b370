"""What `raystill` promises a shell: light help, exit codes, one line for what is wrong, nothing half-written."""

import subprocess
import sys
import time

import pytest

from ray_jobs.__main__ import JOBS, OTHER, interrupted, main

HEAVY = ("torch", "ray", "transformers", "pandas", "scipy", "pyarrow", "numpy", "pydantic")


def fresh_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_help_imports_nothing_heavy_and_lists_every_job():
    code = "import sys\nfrom ray_jobs.__main__ import main\ntry:\n    main(['--help'])\nfinally:\n    print('loaded:', *sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    help_text, _, loaded = text.rpartition("loaded:")
    assert not set(HEAVY) & set(loaded.split())
    assert all(f"\n  {name} " in help_text for name in JOBS | OTHER)


def test_help_answers_within_about_half_a_second():
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ray_jobs", "--help"], capture_output=True, timeout=60, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.6, seconds


def test_no_verb_imports_anything_heavy_before_it_runs():
    code = (
        "import importlib, sys\n"
        f"for job in {[{'run': 'pipeline'}.get(job, job) for job in [*JOBS, 'submit']]}:\n"
        "    importlib.import_module(f'ray_jobs.{job}')\n"
        "print(*sys.modules)"
    )
    assert not {"torch", "ray", "transformers", "pandas", "matplotlib"} & set(fresh_python(code).split())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f'[run]\nname = "a"\nstorage = "{tmp_path}/runs"\n')
    return str(path)


def test_an_earlier_stage_that_is_missing_is_one_line_and_exit_code_2(config, capsys, tmp_path):
    assert main(["finetune", config]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("raystill: stage 'prepare' has not finished")
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_wrong_config_is_one_line_and_exit_code_2_and_writes_nothing(config, capsys, tmp_path):
    assert main(["prepare", config, "--finetune.lora.rnk", "3"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "raystill: unknown config key 'finetune.lora.rnk': did you mean 'rank'?\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [[], ["prepare"], ["dance", "run.toml"], ["submit", "prepare", "run.toml"], ["jobs"], ["jobs", "dance"]])
def test_what_is_no_command_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: raystill" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["submit", "--help"], ["jobs", "--help"], ["jobs", "logs", "--help"], ["--version"]])
def test_every_command_explains_itself(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "raystill" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["submit", "prepare", "CONFIG"], ["jobs", "list"], ["jobs", "logs", "some-id"]])
def test_a_cluster_that_does_not_answer_is_one_line_and_exit_code_4(command, config, capsys):
    words = [config if word == "CONFIG" else word for word in command]
    assert main([*words, "--address", "http://127.0.0.1:1"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("raystill: no Ray job server answers at http://127.0.0.1:1")
    assert len(error.splitlines()) == 1


def test_an_address_that_is_none_is_exit_code_2(capsys):
    assert main(["jobs", "list", "--address", "ray://127.0.0.1:10001"]) == 2
    assert "like http://127.0.0.1:8265" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on_and_help_what_force_makes_anew(capsys):
    for words in (["tune", "a.toml"], ["run", "a.toml", "--force"]):
        assert interrupted(words).endswith("the same command goes on from here")
    assert "the same command without --force goes on" in interrupted(["tune", "a.toml", "--force"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "stages that were made with other settings" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_config_is_not_sent(config, capsys):
    assert main(["submit", "prepare", config, "--address", "http://127.0.0.1:1", "--run.storage", "runs"]) == 2
    assert "is relative" in capsys.readouterr().err


def test_merge_is_finetunes_alone(config, capsys):
    assert main(["distill", config, "--merge"]) == 2
    assert capsys.readouterr().err.startswith("raystill: --merge is finetune's alone, not of job 'distill'")
    assert main(["finetune", config, "--merge", "--finetune.method", "full"]) == 2
    assert 'merge = true needs an adapter and method = "full" trains every weight' in capsys.readouterr().err


def test_a_sweep_over_adapters_of_a_method_that_has_none_is_refused(config, capsys):
    assert main(["tune", config, "--finetune.method", "full"]) == 2
    assert 'varies finetune.lora.rank, and finetune.method = "full" has no adapter' in capsys.readouterr().err
