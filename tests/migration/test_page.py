"""The page of migration is fresh, covers every flag, and names only keys and recipes that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from framework.compose import recipe_names
from framework.migrate import TRAINERS, Trainer, read_table
from framework.schema.names import known_paths
from framework.schema.run import RunConfig
from tests.migration.page import render_page

ROOT = Path(__file__).resolve().parents[2]
# `add_argument` of diffsynth/diffusion/parsers.py and of every examples/*/model_training/train.py.
FLAGS = Path(__file__).with_name("diffsynth_flags.txt").read_text(encoding="utf-8").split()
SECTIONS = tuple(RunConfig.model_fields)


def test_the_page_is_fresh() -> None:
    stale = "run `python -m tests.migration.page > docs/migration.md`"
    assert (ROOT / "docs" / "migration.md").read_text(encoding="utf-8") == render_page(), stale


def test_every_flag_of_diffsynth_studio_is_on_the_page() -> None:
    assert len(FLAGS) == len(set(FLAGS)) == 85
    assert set(read_table("diffsynth").rows) == set(FLAGS)
    page = render_page()
    assert [flag for flag in FLAGS if f"`--{flag}`" not in page] == []


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rows_name_keys_that_exist(trainer: Trainer) -> None:
    table, paths = read_table(trainer), known_paths(RunConfig)
    names = [name for rows in table.groups.values() for row in rows for name in row.names]
    assert len(names) == len(set(names)), "a setting stands twice"
    for name, row in table.rows.items():
        for key in row.here:
            assert key in paths, (name, key)
        for key in re.findall(rf"\b((?:{'|'.join(SECTIONS)})\.[a-z0-9_.]*[a-z0-9_])", row.note):
            assert key in paths, (name, key)
        assert row.note.endswith("."), name
        assert bool(row.here) or row.fate in ("unneeded", "lost"), name
        assert not row.form or (len(row.here) == 1 and row.fate in ("same", "changed")), name


def test_recipes_of_the_page_exist() -> None:
    named = re.findall(r"recipe=([a-z0-9_]+)", render_page())
    assert len(named) >= 7
    assert set(named) <= set(recipe_names())
