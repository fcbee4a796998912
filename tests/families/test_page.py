"""docs/families.md has a proven answer in every cell, and the proofs are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from framework.schema.families import FAMILIES
from tests.families.page import (
    COLUMNS,
    FAILED,
    PASSED,
    ROOT,
    Proof,
    proofs,
    render_cell,
    render_page,
)

PAGE = ROOT / "docs" / "families.md"


def test_every_cell_of_the_page_is_proven() -> None:
    """Also that nothing on it is stale, and no family or column is missing."""
    proven = {family: dict.fromkeys(COLUMNS, PASSED) for family in FAMILIES}
    stale = "run `python -m tests.families.page > docs/families.md`"
    assert PAGE.read_text(encoding="utf-8") == render_page(proven), stale


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_has_tests(family: str) -> None:
    found = proofs(family)
    assert tuple(found) == COLUMNS
    for column, needed in found.items():
        assert needed, column
        for proof in needed:
            assert proof.function in functions(ROOT / proof.file), f"{column}: {proof}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_recipes(family: str) -> None:
    for kind in ("lora", "full"):
        assert (ROOT / "recipes" / f"{family}_{kind}.yaml").is_file()


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_cell_says_what_its_tests_say() -> None:
    needed = (Proof("a.py", "test_x", ("flux",)), Proof("b.py", "test_y"))
    passed = {"a.py::test_x[flux-fp8]": True, "a.py::test_x[sdxl-fp8]": False, "b.py::test_y": True}
    assert render_cell(needed, passed) == PASSED
    assert render_cell(needed, {**passed, "a.py::test_x[flux-disk]": False}) == FAILED
    assert render_cell(needed, {"a.py::test_x[flux-fp8]": True}) == ""
    assert render_cell((), passed) == ""
