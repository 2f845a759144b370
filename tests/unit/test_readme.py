"""The README's file tree names every source file with that file's own first line, and its links lead somewhere."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("ray_jobs", "serve", "tune_spaces")


def reason(path: Path) -> str:
    """Return the first paragraph of a module's docstring on one line."""
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())


def tree() -> str:
    """Return the tree as the README shows it."""
    lines = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path.name)):
            name = path.relative_to(ROOT)
            if path.name == "__init__.py":
                lines.append(f"{name.parent}/  {reason(path)}")
            else:
                lines.append(f"  {path.name:<{22}} {reason(path)}")
    return "\n".join(lines)


def test_tree_is_true():
    shown = re.search(r"<!-- tree -->\n```\n(.*?)\n```", README, re.DOTALL)[1]
    assert shown == tree(), f"replace the README's tree by:\n{tree()}"


def test_every_file_has_a_reason():
    assert not [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not reason(path)]


def test_local_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= targets
