"""Pages that are made from the schema, or that name keys and commands, must stay true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from framework.schema.reference import render_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "assets").rglob("*.md")]
)


def test_the_page_of_keys_is_fresh() -> None:
    stale = "run `octavo schema --format markdown > docs/config.md`"
    assert (ROOT / "docs" / "config.md").read_text() == render_reference(), stale


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
