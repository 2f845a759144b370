import socket
from pathlib import Path

import pytest
import yaml
from made_run import make_run

from ray_jobs import serve
from ray_jobs.core.errors import ConfigError, StageMissing
from serve.schema import ServeArgs

YAML = Path(__file__).parents[2] / "serve" / "teacher_student.yaml"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_others_need_a_key(host):
    with pytest.raises(ConfigError, match="RAYSTILL_API_KEYS"):
        serve.check_bind(host, 0, [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_needs_none(host):
    assert serve.check_bind(host, 0, []) > 0


def test_any_address_with_a_key():
    assert serve.check_bind("0.0.0.0", 0, ["secret"]) > 0


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be bound"):
            serve.check_bind("127.0.0.1", port, [])


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAYSTILL_API_KEYS", " one, two ,,")
    assert serve.api_keys() == ["one", "two"]


def test_a_run_without_a_student_is_refused(tiny_config):
    with pytest.raises(StageMissing, match="finetune"):
        serve.run(tiny_config(serve__port=0), force=False)


def test_sources_of_the_runs_models(tiny_config, tiny_model):
    folder = make_run(tiny_config())
    assert folder.model("base") == (str(tiny_model), None)
    assert folder.model("teacher") == (str(tiny_model), f"{folder.storage.uri}/finetune/adapter")
    assert folder.model("student") == (f"{folder.storage.uri}/distill/student", None)


def test_the_shipped_yaml_is_what_ray_serve_and_the_app_understand():
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    tree = yaml.safe_load(YAML.read_text())
    ServeDeploySchema.model_validate(tree)
    (application,) = tree["applications"]
    # Ray accepts unknown keys in silence, so they are compared here
    assert tree.keys() <= ServeDeploySchema.model_fields.keys()
    assert tree["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    for deployment in application["deployments"]:
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
    args = ServeArgs.model_validate(application["args"])
    assert [deployment["name"] for deployment in application["deployments"]] == list(args.models) == list(serve.MODELS)
    assert tree["http_options"]["host"] == "127.0.0.1"
    module, name = application["import_path"].split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
