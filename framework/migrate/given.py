"""The settings that another trainer was given, and which of them are dealt with already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.migrate.draft import Draft
from framework.migrate.flags import Row, Table

_OFF = ("false", "off", "no", "0", "none", "null", "")


@dataclass
class Given:
    """Settings by name, as text or as values of a file.

    where: place that faults name, e.g. "train.sh:3" or "config.toml".
    Taking a setting marks it as dealt with; `settle_rest` deals with what nobody took.
    """

    values: Mapping[str, Any]
    table: Table
    draft: Draft
    where: str = ""
    taken: set[str] = field(default_factory=set)

    def shown(self, name: str) -> str:
        """The name as it is written there."""
        return f"{self.table.prefix}{name}"

    def has(self, name: str) -> bool:
        """Whether it was given."""
        return self.values.get(name) is not None

    def take(self, name: str) -> Any:
        """The value as it was given; None where it wasn't."""
        self.taken.add(name)
        return self.values.get(name)

    def text(self, name: str, default: str = "") -> str:
        """The value as text."""
        value = self.take(name)
        return default if value is None else str(value)

    def words(self, name: str) -> list[str]:
        """The value as a list: of a comma list, of several words, or of a list in a file."""
        value = self.take(name)
        if value is None:
            return []
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        return [str(item).strip() for item in items if str(item).strip()]

    def is_on(self, name: str, default: bool = False) -> bool:
        """Whether a switch is on."""
        value = self.take(name)
        return default if value is None else str(value).strip().lower() not in _OFF

    def number(self, name: str, default: float | None = None) -> float | None:
        """The value as a number; a fault where it is none."""
        value = self.take(name)
        return default if value is None else self.as_number(name, value, default)

    def as_number(self, name: str, value: object, default: float | None = None) -> float | None:
        """A value that was found below a setting, as a number; a fault where it is none."""
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
        self.draft.refuse(
            self.shown(name),
            f"'{value}' isn't a number",
            hint="Correct it; it is copied into the recipe.",
            where=self.where,
        )
        return default

    def whole(self, name: str, default: int | None = None) -> int | None:
        """The value as a whole number; a fault where it is none."""
        value = self.number(name, None if default is None else float(default))
        return None if value is None else int(value)

    def source(self, *names: str) -> str:
        """What to write behind a key: the settings that made it, with short values; those not given as defaults."""
        parts = []
        for name in names:
            value = self.values.get(name)
            row = self.table.row(name)
            switch = value is True or (row is not None and row.takes == "switch")
            short = str(value)
            if value is None:
                parts.append(f"{self.shown(name)} not given")
            elif switch or len(short) > 32 or "\n" in short:
                parts.append(self.shown(name))
            else:
                parts.append(f"{self.shown(name)} {short}")
        return ", ".join(parts)

    def settle_rest(self) -> None:
        """Copy what can be copied as it is, and say for everything else that nobody took what becomes of it."""
        for name, value in self.values.items():
            if name in self.taken or value is None:
                continue
            row = self.table.row(name)
            if row is None:
                nearest = self.table.nearest(name)
                close = f"; nearest: {', '.join(nearest)}" if nearest else ""
                self.draft.note(
                    "lost",
                    self.shown(name),
                    f"Not known as a setting of {self.table.trainer}{close}.",
                )
            elif row.form:
                self._copy(name, row)
            elif row.takes == "switch" and not self.is_on(name):
                continue
            elif row.fate != "same":
                self.draft.note(row.fate, self.shown(name), row.note)
            self.taken.add(name)

    def _copy(self, name: str, row: Row) -> None:
        (path,) = row.here
        value: Any
        match row.form:
            case "number":
                found = self.number(name)
                if found is None:
                    return
                value = int(found) if found == int(found) and not _is_float_key(path) else found
            case "switch":
                value = self.is_on(name)
            case "list":
                value = self.words(name)
            case _:
                value = self.text(name)
        self.draft.set_(path, value, self.source(name))
        if row.fate == "changed":
            self.draft.note("changed", self.shown(name), row.note)


def _is_float_key(path: str) -> bool:
    """Keys that hold a factor or a rate are written with a point, also where it is a whole number."""
    return path.rpartition(".")[2] in _FLOAT_KEYS


_FLOAT_KEYS = frozenset(
    {
        "lr", "weight_decay", "alpha", "dropout", "logit_mean", "logit_std", "shift", "caption_dropout",
        "huber_delta", "guidance_scale", "fps", "decay", "fraction", "min_snr_gamma", "noise_offset",
    }
)  # fmt: skip
