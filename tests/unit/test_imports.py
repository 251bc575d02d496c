"""Imports run one way, distribution stays in its room, and what is imported is declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mltfr_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0,
    "backbones": 1,
    "baselines": 0,
    "selectors": 0,
    "optimizers": 0,
    "list_metrics": 0,
    "losses": 0,
    "metrics": 0,
    "routers": 0,
    "registry": 0,
    "files": 0,
    "headers": 0,
    "invocation": 0,
    "numerics": 0,
    "progress": 0,
    "statistics": 0,
    "startup": 0,
    "schema": 1,
    "config": 1,
    "repairs": 1,
    **dict.fromkeys(("presets", "data", "tables", "models", "optim"), 2),
    "published": 2,
    "spec": 3,
    "serving": 3,
    "ranking": 3,
    "exported": 3,
    "distributed": 3,
    "training": 4,
    "resolve": 4,
    "tuning": 5,
    "library": 5,
    "cli": 6,
    "train": 7,
    "__main__": 7,
}
"""Room or file to layer: a file imports from its own layer or lower ones, as the tests below
say.
"""

LEAVES = {"presets", "tables", "optim"}
"""Rooms of layer 2 that use none of the others there; models may use data.batch."""


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, inside functions too; `from a import b` gives
    a.b.
    """
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            result |= {f"{node.module}.{alias.name}" for alias in node.names}
    return result


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own(path: Path) -> set[str]:
    """What a file imports from this package, without the package's name."""
    return {
        name.removeprefix("mltfr_dist.") for name in imports(path) if name.startswith("mltfr_dist.")
    }


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_there_are_files_and_every_room_has_its_layer() -> None:
    assert len(FILES) > 30
    assert {room(path) for path in FILES} - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        assert {i.partition(".")[0] for i in own(path)} == {"config", "library"}
        return
    for imported in own(path):
        target = imported.partition(".")[0]
        if target == "__version__" or target == here:
            continue
        assert LAYERS[target] <= LAYERS[here], f"{name(path)} imports {imported}"
        if here in LEAVES:
            assert LAYERS[target] < LAYERS[here], f"{name(path)} imports {imported}"
        if here == "data":
            assert target in ("errors", "schema", "config", "files", "headers", "progress"), (
                f"{name(path)} imports {imported}"
            )


ALONE = """
import sys
before = set(sys.modules)
import mltfr_dist
found = {name for name in set(sys.modules) - before if name.startswith("mltfr_dist.")}
assert not found, found
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_package_by_itself_imports_nothing() -> None:
    """What it names for type checkers is imported at its first use; the commands stay quick."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"mltfr_dist", *sys.stdlib_module_names}


ROOMS_WITHIN: dict[str, dict[str, set[str]]] = {
    "data": {
        "batch": set(),
        "shards": set(),
        "stream": {"batch", "shards"},
        "sources": {"shards"},
        "prepare": {"sources", "shards"},
        "inspect": {"shards"},
    },
    "training": {
        "evaluating": set(),
        "comparing": {"evaluating"},
        "reporting": {"evaluating", "comparing"},
        "using": {"evaluating", "reporting"},
        "running": {"evaluating", "reporting", "using"},
    },
}
"""Folder to its rooms, each with those of the others that it may use; `training` has files for all
of them beside.
"""


@pytest.mark.parametrize(
    "path",
    [path for folder in ROOMS_WITHIN for path in sorted((PACKAGE / folder).rglob("*.py"))],
    ids=name,
)
def test_rooms_within_a_folder_use_each_other_one_way(path: Path) -> None:
    folder, here = path.relative_to(PACKAGE).parts[:2]
    rooms, here = ROOMS_WITHIN[folder], here.removesuffix(".py")
    used = {i.split(".")[1] for i in own(path) if i.startswith(f"{folder}.")} & {*rooms} - {here}
    assert used <= rooms.get(here, set())


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").rglob("*.py")), ids=name)
def test_models_know_of_data_only_the_batch(path: Path) -> None:
    for imported in own(path):
        target = imported.partition(".")[0]
        assert target in (
            "errors",
            "registry",
            "routers",
            "backbones",
            "selectors",
            "schema",
            "config",
            "models",
            "losses",
            "data",
            "numerics",
        ), f"{name(path)} imports {imported}"
        assert target != "data" or imported.startswith("data.batch."), (
            f"{name(path)} imports {imported}"
        )


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").rglob("*.py")), ids=name)
def test_models_speak_of_no_ranks(path: Path) -> None:
    """In their text neither: a rank is that of an item."""
    said = r"\bZeRO\b|DeepSpeed|deepspeed|\b(this|all|every|any|another|many) ranks?\b"
    assert not re.findall(said, path.read_text())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_distribution_stays_in_its_room(path: Path) -> None:
    if room(path) == "distributed":
        return
    forbidden = [i for i in imports(path) if re.match(r"torch\.distributed\b|deepspeed\b", i)]
    assert not forbidden
    attributes = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert not {a for a in attributes if a.startswith("torch.distributed")}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_rule_finds_both_where_they_are() -> None:
    result = set().union(*(imports(path) for path in (PACKAGE / "distributed").glob("*.py")))
    assert any(i.startswith("torch.distributed") for i in result)
    assert any(i.startswith("deepspeed") for i in result)


def test_no_cycles() -> None:
    """Files of one layer may import each other, but not round in a circle."""
    dotted = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    modules = {module.removesuffix(".__init__"): path for module, path in dotted.items()}
    edges = {}
    for module, path in modules.items():
        edges[module] = {
            m for i in own(path) for m in (i, i.rpartition(".")[0]) if m in modules and m != module
        }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for target in edges[module]:
                visit(target, (*above, module))
            done.add(module)

    for module in modules:
        visit(module, ())
    assert edges["models.mltfr"] >= {"models.query_blocks", "config"}


def test_train_py_is_short_and_uses_the_package_only() -> None:
    path = ROOT / "train.py"
    assert len(path.read_text().splitlines()) < 80
    assert {i.partition(".")[0] for i in imports(path)} <= {"mltfr_dist", *sys.stdlib_module_names}


DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "huggingface_hub": "huggingface-hub"}


def test_every_third_party_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in project["dependencies"]}
    used = {i.partition(".")[0] for path in FILES for i in imports(path)} - {
        "mltfr_dist",
        *sys.stdlib_module_names,
    }
    undeclared = {
        module
        for module in used - {"pydantic_core"}
        if DISTRIBUTIONS.get(module, module).lower() not in declared
    }
    assert not undeclared


def test_kernels_keep_to_100_columns() -> None:
    """As Python does by ruff."""
    sources = [
        path for kind in ("*.cpp", "*.h") for path in (PACKAGE / "models/kernels").glob(kind)
    ]
    assert len(sources) > 10
    lines = [(path.name, line) for path in sources for line in path.read_text().splitlines()]
    assert not [(name, line) for name, line in lines if len(line) > 100]
