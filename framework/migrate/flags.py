"""What each setting of another trainer is here: the tables that `octavo migrate` and docs/migration.md both use."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import yaml

Trainer = Literal["diffsynth", "kohya", "musubi", "ai-toolkit"]
Fate = Literal["same", "changed", "unneeded", "lost"]
Form = Literal["number", "text", "switch", "list", ""]

TRAINERS: tuple[Trainer, ...] = ("diffsynth", "kohya", "musubi", "ai-toolkit")


@dataclass(frozen=True)
class Row:
    """One line of a table; see the head of `diffsynth.yaml`.

    names: what is called so elsewhere.   here: keys of Octavo; empty where there is none or none is needed.
    fate: what becomes of the setting.   note: what else to know, in sentences.
    takes: "switch" (no value), "list" (several values), "" for one.
    form: how the value is copied to the one key in `here`; "" where a converter sees to it.
    """

    names: tuple[str, ...]
    fate: Fate
    note: str
    here: tuple[str, ...] = ()
    takes: Literal["switch", "list", ""] = ""
    form: Form = ""


@dataclass(frozen=True)
class Table:
    """All settings of one trainer.   groups: title of a section -> its rows, in the order of the page."""

    trainer: str
    prefix: str
    groups: Mapping[str, tuple[Row, ...]]

    def row(self, name: str) -> Row | None:
        """The row of a name; None for a name that the trainer doesn't have."""
        return self.rows.get(name)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Name -> row."""
        return {name: row for rows in self.groups.values() for row in rows for name in row.names}

    def nearest(self, name: str) -> tuple[str, ...]:
        """Names of theirs that are spelt like this one, best first."""
        close = difflib.get_close_matches(name, list(self.rows), n=2, cutoff=0.75)
        return tuple(f"{self.prefix}{found}" for found in close)


@cache
def read_table(trainer: Trainer) -> Table:
    """Read the shipped table of a trainer."""
    file = Path(__file__).with_name(f"{trainer.replace('-', '_')}.yaml")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    groups = {
        group["title"]: tuple(
            Row(
                names=tuple(row["flags"].split()),
                fate=row["fate"],
                note=row["note"],
                here=tuple(row.get("here", ())),
                takes=row.get("takes", ""),
                form=row.get("form", ""),
            )
            for row in group["rows"]
        )
        for group in content["groups"]
    }
    return Table(content["trainer"], content["prefix"], groups)
