"""The house: packages import those above them, no two files import each other, libraries are used by public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SRC = ROOT / "src"
PACKAGE = next(SRC.glob("*/__init__.py")).parent.name  # forks rename it
FILES = sorted(SRC.rglob("*.py"))
#: Each may import itself and those before it.
ORDER = [
    "errors",
    "data",
    "nets",
    "losses",
    "metrics",
    "schedulers",
    "checkpoint",
    "module",
    "visualize",
    "training",
    "inference",
    "doctor",
]
MODULES = 55  # that `import segmentation.training.cli` loads


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported(tree: ast.Module) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else node.module)
    return found & NAMES.keys()


IMPORTS = {name: imported(tree) for name, tree in NAMES.items()}


def package(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", [name for name in NAMES if name.count(".")])
def test_a_package_imports_only_from_those_above_it(name: str) -> None:
    below = ORDER[ORDER.index(package(name)) + 1 :]
    wrong = [other for other in IMPORTS[name] if other.count(".") and package(other) in below]
    assert wrong == []


def test_no_circles_of_imports() -> None:
    """Where each file that imports nothing of the rest is taken away, again and again, all are."""
    left = {name: others - {name} for name, others in IMPORTS.items()}
    while True:
        leaves = [name for name, others in left.items() if not others & left.keys()]
        if not leaves:
            break
        for name in leaves:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("name", NAMES)
def test_no_private_name_of_a_library(name: str) -> None:
    """`os._exit` is none: its documentation names it."""
    tree = NAMES[name]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    private = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_self and node.attr not in own and ast.unparse(node) != "os._exit":
                private.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE):
            private += [alias.name for alias in node.names if alias.name.startswith("_")]
    assert private == []


@pytest.mark.slow
def test_the_command_line_loads_what_it_needs() -> None:
    """Nothing of the jobs after training."""
    code = "import sys, segmentation.training.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SRC, capture_output=True, text=True, check=True)
    loaded = [name for name in done.stdout.split() if name.split(".")[0] == PACKAGE]
    assert not [name for name in loaded if name.startswith(f"{PACKAGE}.inference")]
    assert len(loaded) <= MODULES, loaded


def test_the_entry_loads_no_torch() -> None:
    """Its import takes seconds, in which Ctrl-C and the death of a launcher must already count."""
    code = "import sys, segmentation.training.entry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC, check=False).returncode == 0
