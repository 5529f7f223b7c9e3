"""The layers of the house: imports point only to what stands above in the design's list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aim_surgery

PACKAGE = Path(aim_surgery.__file__).parent
# From the top down; a module may import from its own layer and from those before it.
ORDER = (
    "_version",
    "_garbage",
    "errors",
    "file_format",
    "nn",
    "capture",
    "sites",
    "config",
    "planning",
    "surgery",
    "lowering",
    "operation",
    "notebook",
    "verification",
    "checkpoint",
    "cli_options",
    "cli_output",
    "cli_demo",
    "cli",
    "__init__",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(source: str) -> set[str]:
    """Layers of this package that a module imports at run time."""
    tree = ast.parse(source)
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = (name.split(".") for name in names)
    return {p[1] for p in parts if p[0] == "aim_surgery" and len(p) > 1 and p[1] in ORDER}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__main__":
        return
    allowed = ORDER[: ORDER.index(layer) + 1]
    wrong = imported_layers(path.read_text()) - set(allowed)
    assert not wrong, f"{layer} imports {wrong}"


def test_the_check_can_fail() -> None:
    assert imported_layers("from aim_surgery.cli import main") == {"cli"}
    assert imported_layers("from aim_surgery import cli\nimport aim_surgery.sites") == {
        "cli",
        "sites",
    }
    assert imported_layers("if TYPE_CHECKING:\n    from aim_surgery.cli import main") == set()


def test_files_stay_readable() -> None:
    long = {str(path.name): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in long.items() if count > 500} == {}


def test_no_public_name_hides_a_module() -> None:
    """`aim_surgery.lower` was a function and a package, so one of them could not be had."""
    modules = {layer_of(path) for path in FILES} - {"__init__"}
    assert {"lowering", "operation"} <= modules
    assert not modules & set(aim_surgery.__all__)
