"""Who may import whom: one way only, from the verbs down to core; and verbs load nothing heavy by being imported."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("training", "distillation", "judging", "compression", "corpus", "reporting")
BELOW_VERBS = {f"ray_jobs.{room}" for room in ROOMS} | {"ray_jobs.core", "ray_jobs", "serve", "tune_spaces"}
HEAVY = {"torch", "transformers", "ray", "pandas", "scipy", "peft", "gensim", "openvino", "onnxruntime", "matplotlib", "fastapi"}
RAY_FREE = {"ray_jobs.judging", "ray_jobs.compression", "ray_jobs.training", "ray_jobs.distillation", "ray_jobs.reporting"}
RAY_LAYERS = {
    "ray_jobs.training.ray_train",
    "ray_jobs.training.ray_worker",
    "ray_jobs.distillation.pool",
    "ray_jobs.distillation.pool_actors",
    "ray_jobs.judging.ray_calls",
    "ray_jobs.judging.ray_limiter",
}
LONGER_FILES = {"ray_jobs.core.config": 460}  # one list of fields, read from top to bottom
LONGER_FUNCTIONS = {"ray_jobs.training.loop": 80}
FILES = sorted(path for top in ("ray_jobs", "serve", "tune_spaces") for path in (ROOT / top).rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_verb(module):
    return module.startswith("ray_jobs.") and module.count(".") == 1 and (ROOT / "ray_jobs" / f"{module[9:]}.py").is_file()


VERBS = {module_of(path) for path in FILES if is_verb(module_of(path))} - {"ray_jobs.__main__"}


def room_of(module):
    """The part of the house a module is in: ray_jobs.training, serve, tune_spaces, "verb", or a package outside."""
    if module in VERBS or module == "ray_jobs.__main__":
        return "verb"
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ray_jobs" else parts[0]


@functools.cache
def imports(path, *, top_level_only=False):
    """The modules a file imports, by their full names; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def allowed(module):
    """The rooms a module may import from, beside its own and packages outside."""
    room = room_of(module)
    if room == "verb":
        return BELOW_VERBS
    if room == "ray_jobs.distillation":
        return {"ray_jobs.training", "ray_jobs.corpus", "ray_jobs.judging", "ray_jobs.core", "ray_jobs"}
    if room == "ray_jobs.reporting":
        return {"ray_jobs.judging", "ray_jobs.core", "ray_jobs"}
    if room == "tune_spaces":
        return set()
    return {"ray_jobs.core", "ray_jobs"}


def ours(module):
    return module.split(".")[0] in {"ray_jobs", "serve", "tune_spaces"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_below(path):
    module = module_of(path)
    for imported in filter(ours, imports(path)):
        if imported in VERBS:
            assert module in {"ray_jobs.tune", "ray_jobs.pipeline", "ray_jobs.__main__"}, f"{module} imports the verb {imported}"
        elif imported == "ray_jobs.__main__" or imported.startswith("ray_jobs.__main__."):
            assert module == "ray_jobs.submit"
        else:
            room = "ray_jobs" if imported.startswith("ray_jobs.__version__") else room_of(imported)
            assert room == room_of(module) or room in allowed(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_of_serve_the_verbs_know_the_client_and_the_engines_alone(path):
    if room_of(module_of(path)) == "verb" and module_of(path) != "ray_jobs.serve":
        named = {name for name in imports(path) if name.startswith("serve.")}
        assert all(name.startswith(("serve.client", "serve.engines")) for name in named), named


@pytest.mark.parametrize("path", [path for path in FILES if room_of(module_of(path)) in RAY_FREE], ids=module_of)
def test_the_machinery_is_free_of_ray(path):
    if module_of(path) not in RAY_LAYERS:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", [path for path in FILES if room_of(module_of(path)) != "verb"], ids=module_of)
def test_config_never_enters_the_machinery(path):
    if room_of(module_of(path)) != "ray_jobs.core":
        assert not [name for name in imports(path) if name == "ray_jobs.core.config" or name.startswith("ray_jobs.core.config.")]


@pytest.mark.parametrize("path", [path for path in FILES if room_of(module_of(path)) == "verb"], ids=module_of)
def test_a_verb_imports_nothing_heavy_at_its_top(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_stay_small(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LONGER_FILES.get(module_of(path), 300)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGER_FUNCTIONS.get(module_of(path), 50), node.name
