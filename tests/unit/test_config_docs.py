"""docs/config.md is what the fields' docstrings say."""

from pathlib import Path

from ray_jobs.core.config import Config
from ray_jobs.core.config_docs import config_docs
from ray_jobs.core.config_file import flatten, validate


def test_the_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == config_docs(), "run: python -m ray_jobs.core.config_docs > docs/config.md"


def test_every_field_is_on_it_with_its_default():
    text = config_docs()
    for key, default in flatten(validate({"run": {"name": "a"}}).model_dump()).items():
        section, _, field = key.rpartition(".")
        lines = text.partition(f"## [{section}]\n")[2].partition("\n## ")[0].splitlines()
        line = next(line for line in lines if line.startswith(f"| `{field}` |"))
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert f"| `{default}` |" in line
        assert line.count("|") - line.count("\\|") == 5
    assert set(Config.model_fields) <= {line[4:-1].split(".")[0] for line in text.splitlines() if line.startswith("## [")}
