"""Faults about files and folders: the nearest names beside what was written, and how a recipe says to make it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from framework.errors import Fault, SourceError

Where = Callable[[str], str]

_NUM_NEAREST = 3
_POSITION = re.compile(r"(?P<file>.+?\.ya?ml):\d+:\d+")
_PREPARE = re.compile(r"#\s*Prepare:\s*(?P<command>\S.*)")
_FURTHER = re.compile(r"#\s{4,}(?P<command>\S.*)")


@dataclass
class Findings:
    """What the check of the disk has found so far.   where: path -> what set it.

    need: whether what is missing stops the run; otherwise it is only a warning.
    """

    where: Where
    need: bool
    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)

    def refuse(
        self, path: str, message: str, *, hint: str, code: str = "file", value: str = ""
    ) -> None:
        """Note a fault."""
        self.faults.append(
            Fault(path, message, self.where(path), hint=hint, code=code, value=value)
        )

    def warn(
        self,
        path: str,
        message: str,
        *,
        hint: str,
        code: str = "unusual",
        nearest: tuple[str, ...] = (),
    ) -> None:
        """Note a warning."""
        self.warnings.append(Fault(path, message, self.where(path), nearest, hint, code=code))

    def missing(
        self,
        path: str,
        message: str,
        *,
        hint: str,
        value: str,
        nearest: tuple[str, ...] = (),
        allowed: str = "",
    ) -> None:
        """Note something that isn't on this disk: a fault for a run, a warning where it may be on another machine."""
        place = self.where(path)
        prepare = prepare_commands(place, value)
        if prepare:
            hint = f"Run `{' && '.join(prepare)}`, as the recipe says."
        elif nearest:
            hint = f"Write {path}={nearest[0]}."
        fault = Fault(
            path, message, place, nearest, hint, code="file", value=value, allowed=allowed
        )
        (self.faults if self.need else self.warnings).append(fault)


def nearest_entries(
    typed: str, bases: Iterable[Path], *, keep: Callable[[Path], bool] = lambda entry: True
) -> tuple[str, ...]:
    """Files and folders beside what was typed whose names are close, written as it was typed; best first.

    bases: folders in which a relative path is looked for.   keep: which entries count.
    """
    path = Path(typed).expanduser()
    for base in bases:
        parent = (base / path).parent
        try:
            names = [entry.name for entry in parent.iterdir() if keep(entry)]
        except OSError:
            continue
        close = difflib.get_close_matches(path.name, names, n=_NUM_NEAREST, cutoff=0.6)
        if close:
            written = typed.rstrip("/").rpartition("/")
            return tuple(f"{written[0]}{written[1]}{name}" for name in close)
    return ()


def source_fault(path: str, error: SourceError, where: Where, value: str) -> Fault:
    """A fault from an error about a checkpoint or a LoRA file."""
    details = "; ".join(part for part in (error.where, error.found) if part)
    return Fault(
        path,
        f"{error.message} ({details})" if details else error.message,
        where(path),
        hint=sentence(error.hint) or "Fetch the checkpoint again, or give another.",
        code="file",
        value=value,
    )


def sentence(text: str) -> str:
    """Write a hint as a sentence: capital letter and full stop."""
    if not text:
        return ""
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith((".", "!")) else ".")


def prepare_commands(place: str, mentioned: str) -> list[str]:
    """The commands after `# Prepare:` in the head of the recipe at `place` that make what is mentioned.

    place: what set the value, e.g. "recipes/pocket_lora.yaml:23:3".   Empty where the recipe says nothing of it.
    """
    match = _POSITION.fullmatch(place)
    if match is None:
        return []
    try:
        lines = Path(match["file"]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    commands: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        first = _PREPARE.fullmatch(line)
        further = _FURTHER.fullmatch(line) if commands else None
        if first is not None:
            commands = [first["command"].strip()]
        elif further is not None:
            commands.append(further["command"].strip())
        elif commands:
            break
    return [command for command in commands if mentioned in command.split()]
