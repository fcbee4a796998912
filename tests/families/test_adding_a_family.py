"""The example of docs/adding_a_family.md works as it stands on the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding_a_family.md"
FILES = {
    "framework/schema/specs/aura_flow.py",
    "framework/models/aura_flow.py",
    "conf/model/aura_flow.yaml",
    "recipes/aura_flow_lora.yaml",
    "tests/families/aura_flow.py",
    "tests/families/test_aura_flow.py",
}
BUILDER = "to framework/models/__init__.py"
# What the page tells to add to a line that is there: file -> (where, what).
ADDITIONS = {
    "framework/schema/families.py": [
        ("from framework.schema.specs.flux", "from framework.schema.specs.aura_flow import AURA_FLOW\n"),
        ("QWEN_IMAGE, QWEN_IMAGE_EDIT,", "AURA_FLOW, "),
    ],
    "framework/schema/model.py": [('"qwen_image", "qwen_image_edit",', '"aura_flow", ')],
    "framework/models/__init__.py": [('"qwen_image": _qwen_image,', '"aura_flow": _aura_flow, ')],
}  # fmt: skip


def read_blocks() -> dict[str, str]:
    """Path -> text of each block whose first line names its file."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = r"^```(?:python|yaml)\n# ([^\n]+)\n(.*?)^```$"
    return dict(re.findall(pattern, text, re.MULTILINE | re.DOTALL))


def build_package(folder: Path) -> Path:
    """The package with what its tests need, and with the page's files and additions."""
    for name in ("framework", "conf", "recipes", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    blocks = read_blocks()
    for path in FILES:
        (folder / path).write_text(blocks[path], encoding="utf-8")
    for path, additions in ADDITIONS.items():
        text = (folder / path).read_text(encoding="utf-8")
        for place, addition in additions:
            text = add_before(text, place, addition)
        if BUILDER.endswith(path):
            text = add_before(text, "_BUILDERS: ", f"{blocks[BUILDER]}\n\n")
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def add_before(text: str, place: str, addition: str) -> str:
    # Lines may have been broken since.
    found = re.search(r"\s+".join(re.escape(word) for word in place.split(" ")), text)
    assert found is not None, place
    return text[: found.start()] + addition + text[found.start() :]


def test_the_page_shows_every_file_and_names_the_registries() -> None:
    assert set(read_blocks()) == FILES | {BUILDER}
    page = PAGE.read_text(encoding="utf-8")
    for path in ADDITIONS:
        assert f"`{path}`" in page
    for word in ("`AURA_FLOW`", '`"aura_flow"`', "`FAMILIES`", "`FamilyName`", "`_BUILDERS`"):
        assert word in page


@pytest.mark.slow
def test_the_example_is_diffusers_and_trains(tmp_path: Path) -> None:
    folder = build_package(tmp_path / "package")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    recipes = "tests/recipes/test_every_yaml.py"
    done = subprocess.run(
        [*command, "tests/families/test_aura_flow.py", recipes, "-k", "aura_flow"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 8, done.stdout[-1000:]
