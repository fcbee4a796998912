"""Every error that Octavo raises on purpose, so that a caller can tell a user's mistake from ours.

    OctavoError              something a person can act on; never shown with a traceback
    ├── ConfigError          the configuration is wrong; carries every fault found         exit code 2
    ├── SourceError          a model folder, file or hub repository can't be used           exit code 2
    ├── DataError            a data set, caption file or picture can't be used              exit code 2
    ├── PlanError            the plan can't be built or carried out on this machine         exit code 2
    └── RunError             a run can't be started, resumed or finished                    exit code 1
        └── RunStopped       a run was ended from outside; the same command goes on         exit code 1

Each says where the fault is, what was found and what to do next (`where`, `found`, `hint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FAULT_CODES: Mapping[str, str] = {
    "invalid": "The configuration can't be used as it is.",
    "unknown-key": "A key that no part of Octavo reads.",
    "renamed-key": "A key that has another name here, or had one before.",
    "foreign-flag": "A command-line flag of another trainer.",
    "missing-key": "A key that has no default and wasn't given.",
    "wrong-value": "A value that isn't one of those allowed.",
    "wrong-type": "A value of the wrong type.",
    "out-of-range": "A number outside its range.",
    "wrong-length": "A list or text that is too short or too long.",
    "unknown-option": "A configuration group has no file of that name.",
    "override-syntax": "A command-line override that can't be parsed.",
    "given-twice": "A key that the command line gives two different values.",
    "sweep": "Several values for one key that can't be run as a sweep.",
    "yaml-syntax": "A file that isn't readable YAML.",
    "defaults-list": "A defaults list that can't be followed.",
    "interpolation": "An interpolation without a target.",
    "hydra-setting": "A setting of Hydra itself that Octavo doesn't read.",
    "rule": "Settings that are allowed alone but not together.",
    "file": "A file or folder that a setting names and that can't be used.",
    "layer-name": "A pattern that matches no layer of the checkpoint.",
    "unused": "A setting that nothing reads in this combination.",
    "unusual": "A value that is allowed but surely not meant.",
}
"""What a fault's code means; codes are stable, so that scripts may rely on them."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong (or surely unwanted) in a configuration.

    path: dotted path of the key, "" for the configuration as a whole.
    message: what was asked for and why it can't be, in one sentence.
    where: "recipes/a.yaml:14:5", "command line: model.dit.precision=fp9" or "default"; "" when unknown.
    nearest: valid names close to what was written, best first.
    hint: what to do next.
    code: kind of fault, a key of FAULT_CODES; for scripts.
    value: what was written, as YAML would show it; "" where there is no single value.   The message says it too.
    allowed: what may be written instead, in words; the message says it too.
    """

    path: str
    message: str
    where: str = ""
    nearest: tuple[str, ...] = ()
    hint: str = ""
    code: str = "invalid"
    value: str = ""
    allowed: str = ""

    def __post_init__(self) -> None:
        assert self.code in FAULT_CODES, self.code


class OctavoError(Exception):
    """Base of all errors that are meant for a person.

    message: what was asked for and what is wrong.   where: file, line or override.
    found: what was met instead.   hint: the next step.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", found: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.found:
            lines.append(f"  Found: {self.found}")
        if self.hint:
            lines.append(f"  Next: {self.hint}")
        return "\n".join(lines)


class ConfigError(OctavoError):
    """The configuration is wrong: all faults of it in one report."""

    exit_code = 2

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        super().__init__(f"{count} fault{'s' if count != 1 else ''} in the configuration")

    def __str__(self) -> str:
        return "\n".join([f"{self.message}:", *(format_fault(fault) for fault in self.faults)])


class SourceError(OctavoError):
    """A model's files can't be found, fetched or read."""

    exit_code = 2


class DataError(OctavoError):
    """A data set can't be read: a missing folder, a caption file with wrong columns, a broken picture."""

    exit_code = 2


class PlanError(OctavoError):
    """The checkpoint doesn't fit the configuration, or this machine can't carry the plan out."""

    exit_code = 2


class RunError(OctavoError):
    """A run can't be started, resumed or finished."""

    exit_code = 1


class RunStopped(RunError):
    """A run was asked to end, e.g. by a scheduler; nothing is wrong with it, and the same command goes on."""


def format_fault(fault: Fault) -> str:
    """Write one fault as indented plain text: path and message first, then where, nearest and next."""
    lines = [f"  {fault.path}: {fault.message}" if fault.path else f"  {fault.message}"]
    if fault.where:
        lines.append(f"      Set by: {fault.where}")
    if fault.nearest:
        lines.append(f"      Nearest: {', '.join(fault.nearest)}")
    if fault.hint:
        lines.append(f"      Next: {fault.hint}")
    return "\n".join(lines)
