"""Write what `raystill plan` prints for each ready run into docs/memory.md: python -m benchmarks.plan_tables [NAME.toml ...]."""

import re
import sys
import tempfile
from pathlib import Path

from ray_jobs import plan
from ray_jobs.core.config_file import load_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"
CONFIGS = ROOT / "ray_jobs" / "configs"
_BLOCK = re.compile(r"(<!-- raystill plan (\S+) -->\n```\n).*?(\n```)", re.DOTALL)


def planned() -> list[str]:
    """Return the names of the ready runs that have a block on the page."""
    return [match[2] for match in _BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]


def shown(name: str) -> str:
    """Return what the page shows of a ready run."""
    return next(match[0].split("```\n")[1].rstrip("`\n") for match in _BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if match[2] == name)


def printed(name: str) -> str:
    """Return what the command prints of a ready run that has not begun."""
    with tempfile.TemporaryDirectory() as folder:
        summary = plan.run(load_config(CONFIGS / name, ["--run.storage", folder]), force=False)
    return "\n".join(line.rstrip() for line in summary["headline"])


def replace(name: str, lines: str) -> None:
    """Write a ready run's block."""
    text = PAGE.read_text(encoding="utf-8")
    new = _BLOCK.sub(lambda match: match[1] + lines + match[3] if match[2] == name else match[0], text)
    PAGE.write_text(new, encoding="utf-8")


def main() -> None:
    """Bring the page up to date, or only the blocks of the ready runs named."""
    for name in sys.argv[1:] or planned():
        replace(name, printed(name))


if __name__ == "__main__":
    main()
