"""Guards the size and the import rules that the layer contract in pyproject.toml doesn't express."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "framework").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
TORCH_FREE = (
    "errors.py", "hub", "inventory.py", "schema", "plan", "compose", "judge", "sweep", "migrate"
)  # fmt: skip
HYDRA_PLACES = ("compose", "sweep/launchers.py")


def imported_modules(tree: ast.Module) -> set[str]:
    """Top-level names of everything imported anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_the_walk_finds_the_package() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
            if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue  # a kernel's arguments are pointers, sizes and strides, each on its own
            arguments = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            assert len([a for a in arguments if a not in {"self", "cls"}]) <= MAX_PARAMETERS, (
                node.name
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hydra_is_imported_in_two_places_and_torch_stays_out_of_the_plan(path: Path) -> None:
    inside = path.relative_to(ROOT / "framework").parts
    imported = imported_modules(ast.parse(path.read_text()))
    if not "/".join(inside).startswith(HYDRA_PLACES):
        assert not imported & {"hydra", "omegaconf"}
    if inside[0] in TORCH_FREE:
        assert not imported & {"torch", "lightning", "diffusers", "transformers", "peft"}
