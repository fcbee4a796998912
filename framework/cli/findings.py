"""What judging many configurations found: counted, and each fault once with the configurations that it concerns."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from framework.errors import Fault

Level = Literal["error", "warning"]
_COMMAND_LINE = "command line: "
_POSITION = re.compile(r"(?P<file>.+?)(?::(?P<line>\d+))?(?::(?P<column>\d+))?")
_MAX_NAMES = 3


@dataclass(frozen=True)
class Place:
    """What set a value, split into its parts. line and column count from 1; 0 means unknown."""

    kind: Literal["file", "override", "default", "unknown"]
    text: str
    file: str = ""
    line: int = 0
    column: int = 0
    override: str = ""


def read_place(where: str) -> Place:
    """Split a fault's `where`."""
    if not where:
        return Place("unknown", where)
    if where == "default":
        return Place("default", where)
    if where.startswith(_COMMAND_LINE):
        return Place("override", where, override=where.removeprefix(_COMMAND_LINE))
    found = _POSITION.fullmatch(where)
    if found is None:
        return Place("unknown", where)
    line, column = int(found["line"] or 0), int(found["column"] or 0)
    return Place("file", where, found["file"], line, column)


@dataclass(frozen=True)
class Judged:
    """One configuration and what was found in it.

    name: how a person tells it from the others, e.g. "recipe=pocket_lora optim.lr=1e-4" or a file's path.
    file: the recipe's own file as a person would type it; "" where it isn't known.
    """

    name: str
    overrides: tuple[str, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    file: str = ""


@dataclass(frozen=True)
class Finding:
    """One fault or warning with the names of all configurations that have it.

    place: where it is best shown: what set the value, else the recipe's file.
    """

    fault: Fault
    level: Level
    names: tuple[str, ...]
    place: Place


@dataclass(frozen=True)
class Report:
    """What one call of `octavo validate` found.

    strict: whether warnings count as faults; those about files that aren't on this machine never do.
    """

    judged: tuple[Judged, ...]
    seconds: float
    strict: bool = False

    def of_the_repository(self) -> Report:
        """The same without warnings about files that aren't on this machine, which no change of a recipe can help."""
        kept = [
            replace(one, warnings=tuple(w for w in one.warnings if counts_when_strict(w)))
            for one in self.judged
        ]
        return replace(self, judged=tuple(kept))

    @property
    def num_faulty(self) -> int:
        """Configurations that can't be used as they are."""
        return sum(bool(one.faults) for one in self.judged)

    @property
    def failed(self) -> bool:
        """Whether the command's exit code says that something is wrong."""
        counted = self.strict and any(
            counts_when_strict(fault) for one in self.judged for fault in one.warnings
        )
        return counted or self.num_faulty > 0

    def findings(self) -> list[Finding]:
        """Every different fault once, then every different warning, each in order of first appearance."""
        found: dict[tuple[Fault, Level], list[Judged]] = {}
        for one in self.judged:
            for fault in one.faults:
                found.setdefault((fault, "error"), []).append(one)
        for one in self.judged:
            for fault in one.warnings:
                strict = self.strict and counts_when_strict(fault)
                found.setdefault((fault, "error" if strict else "warning"), []).append(one)
        return [
            Finding(
                fault, level, tuple(dict.fromkeys(one.name for one in ones)), _shown_at(fault, ones)
            )
            for (fault, level), ones in found.items()
        ]

    def summary(self) -> str:
        """The last line, e.g. "8 configurations: 5 valid, 3 with faults, 2 warnings; 0.9 s"."""
        total = len(self.judged)
        warnings = len({fault for one in self.judged for fault in one.warnings})
        parts = [f"{total - self.num_faulty} valid"]
        parts += [f"{self.num_faulty} with faults"] if self.num_faulty else []
        parts += [f"{warnings} warning{'s' * (warnings != 1)}"] if warnings else []
        line = (
            f"{total} configuration{'s' * (total != 1)}: {', '.join(parts)}; {self.seconds:.1f} s"
        )
        if self.failed and not self.num_faulty:
            line += " (with --strict, warnings count as faults)"
        return line

    def concerned(self, finding: Finding) -> str:
        """Say which configurations a finding concerns; "" where there is only one configuration."""
        total, names = len(self.judged), finding.names
        if total == 1:
            return ""
        if len(names) == total:
            return f"all {total} configurations"
        shown = "; ".join(names[:_MAX_NAMES])
        more = f"; and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return f"{len(names)} of {total} configurations: {shown}{more}"


def counts_when_strict(warning: Fault) -> bool:
    """Whether --strict makes a fault of a warning. A machine that only checks has no data and no earlier runs."""
    return warning.code != "file"


def from_repository(file: str) -> str | None:
    """A file's path from the root of the repository, with forward slashes; None where it lies outside.

    The root is the workspace of GitHub Actions where that is set, else the current folder.
    """
    root = repository_root()
    path = Path(file).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


def repository_root() -> Path:
    """The folder that paths in machine-readable reports start from."""
    here = Path.cwd().resolve()
    workspace = os.environ.get("GITHUB_WORKSPACE", "")
    root = Path(workspace).resolve() if workspace else here
    return root if here.is_relative_to(root) else here


def _shown_at(fault: Fault, ones: Sequence[Judged]) -> Place:
    place = read_place(fault.where)
    if place.kind in ("default", "unknown") and ones[0].file:
        return Place("file", ones[0].file, ones[0].file, 1)
    return place
