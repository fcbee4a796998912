"""Judges a whole configuration at once, so that a person sees every fault in one report and before anything is read.

Field errors are found by pydantic and put into our words (`describe.py`). What is faulty is then replaced by a default,
so that the rules across keys (`rules.py`) can judge the rest in the same report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from framework.errors import ConfigError, Fault
from framework.schema.describe import Describer
from framework.schema.findings import Finding, Where
from framework.schema.paths import (
    UNSET,
    Pieces,
    copy_with_text_keys,
    join_path,
    overlaps,
    put_,
    remove_,
    unset_paths,
)
from framework.schema.rules import check_rules
from framework.schema.run import RunConfig
from framework.schema.wording import section_class, slot_at

__all__ = [
    "UNSET",
    "Examination",
    "Use",
    "examine_values",
    "join_path",
    "judge_section",
    "judge_values",
    "validate",
]

Use = Literal["train", "plan", "generate"]
AnySection = TypeVar("AnySection", bound=BaseModel)

_MAX_ROUNDS = (
    12  # each round removes every fault that pydantic reports; two or three are enough in practice
)
_STAND_IN = "unset"


def validate(
    values: Mapping[str, Any], where: Where, *, use: Use = "train"
) -> tuple[RunConfig, list[Fault]]:
    """Turn composed values into a RunConfig and warnings.   Raises ConfigError with every fault."""
    config, faults, warnings = judge_values(values, where, use=use)
    if config is None:
        raise ConfigError(faults)
    return config, warnings


def judge_values(
    values: Mapping[str, Any], where: Where, *, use: Use = "train"
) -> tuple[RunConfig | None, list[Fault], list[Fault]]:
    """Judge composed values: the configuration (None where it has faults), every fault, every warning.

    The parameters are those of `examine_values`.
    """
    found = examine_values(values, where, use=use)
    return (None if found.faults else found.repaired), found.faults, found.warnings


@dataclass(frozen=True)
class Examination:
    """What is known of composed values.

    repaired: the configuration with a default or stand-in for everything faulty; what it says of the rest is right.
    stand_ins: paths whose value was faulty or is missing, so that nothing should be said of them.
    """

    repaired: RunConfig
    stand_ins: frozenset[str]
    faults: list[Fault]
    warnings: list[Fault]


def examine_values(values: Mapping[str, Any], where: Where, *, use: Use = "train") -> Examination:
    """Find everything that is wrong or unwanted in composed values. Raises nothing for what a person wrote.

    values: nested plain data; "???" stands for a value that must still be given.   where: path -> what set it.
    use: `plan` and `generate` don't read data, so a missing `data.path` is no fault there; `generate` trains nothing.
    Faults are unknown keys, missing and wrong values, and rules across keys.
    """
    judging = _Judging(
        Describer(RunConfig, where), optional=() if use == "train" else _READ_TO_TRAIN
    )
    config = judging.repaired(RunConfig, values)
    errors, warnings = check_rules(config, values, where, trains=use != "generate")
    for finding in errors:
        if not judging.touches(finding):
            judging.record(finding.fault)
    told = [finding.fault for finding in warnings if not judging.touches(finding)]
    stand_ins = frozenset(judging.replaced)
    return Examination(config, stand_ins, list(judging.faults.values()), told)


def judge_section(
    root: type[AnySection], values: Mapping[str, Any], where: Where, *, prefix: str
) -> tuple[AnySection | None, list[Fault]]:
    """Judge the values of any section: the section (None where it has faults) and every fault.

    prefix: path of the section in the configuration, e.g. "hydra.launcher"; paths in faults and for `where` begin so.
    """
    judging = _Judging(Describer(root, where, prefix))
    section = judging.repaired(root, values)
    return (None if judging.faults else section), list(judging.faults.values())


# Top-level sections that only training reads.
_READ_TO_TRAIN = ("data", "run", "logger", "export")


@dataclass
class _Judging:
    """What has been found so far.

    faults: by path.   replaced: paths whose value is only a stand-in now, so that no rule speaks of them.
    optional: sections in which a missing value is no fault.
    """

    describer: Describer
    optional: Sequence[str] = ()
    faults: dict[str, Fault] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)

    def repaired(self, root: type[AnySection], values: Mapping[str, Any]) -> AnySection:
        """Note every fault of the values themselves; return them with stand-ins for what is faulty."""
        working = copy_with_text_keys(values)
        for pieces in list(unset_paths(working)):
            remove_(working, pieces)
            if slot_at(root, pieces) is None:
                self.record(self.describer.unknown_key(pieces, None))
        for pieces, found in list(_booleans_as_numbers(working, root, ())):
            self.record(self.describer.not_a_number(pieces, found))
            self.replaced.add(join_path(pieces))
            remove_(working, pieces)
        for _ in range(_MAX_ROUNDS):
            try:
                return root.model_validate(working)
            except ValidationError as error:
                for pieces, details in _by_key(root, error.errors()).items():
                    self._take_out(working, root, pieces, details)
        raise AssertionError(f"could not judge any further: {sorted(self.replaced)}")

    def _take_out(
        self,
        working: dict[str, Any],
        root: type[BaseModel],
        pieces: Pieces,
        details: Sequence[ErrorDetails],
    ) -> None:
        """Note the fault of one key, and put a stand-in in its place. Changes `working`."""
        path, kind = join_path(pieces), details[0]["type"]
        if kind == "missing" and any(isinstance(piece, int) for piece in pieces):
            self.record(self.describer.missing(pieces))
            remove_(working, pieces)  # with the list around it
        elif kind == "missing" and isinstance(details[0]["loc"][-1], str):
            if not self._fill_in(working, root, pieces):
                return
        elif kind == "extra_forbidden":
            self.record(self.describer.unknown_key(pieces, details[0]["input"]))
            remove_(working, pieces)
        else:
            self.record(self.describer.value_fault(pieces, details))
            remove_(working, pieces)
        self.replaced.add(path)

    def _fill_in(self, working: dict[str, Any], root: type[BaseModel], pieces: Pieces) -> bool:
        """Put a stand-in for a required key, and return whether it is one that no rule may speak of.

        It was never given, or it (or the section around it) was faulty and taken out just before.
        """
        slot = slot_at(root, pieces)
        is_section = slot is not None and section_class(slot.annotation) is not None
        choices = slot.choices if slot is not None else ()
        put_(working, pieces, {} if is_section else choices[0] if choices else _STAND_IN)
        if is_section:
            return False  # the next round names the keys that it must have
        around = (join_path(pieces[:end]) for end in range(1, len(pieces) + 1))
        if pieces[0] not in self.optional and not any(path in self.replaced for path in around):
            self.record(self.describer.missing(pieces))
        return True

    def record(self, fault: Fault) -> None:
        """Keep the first fault of a path; rules on the same path say something else and are kept too."""
        key = fault.path if fault.path not in self.faults else f"{fault.path}: {fault.message}"
        self.faults.setdefault(key, fault)

    def touches(self, finding: Finding) -> bool:
        """Whether a rule looked at a value that is only a stand-in, or lies in or around a faulty section."""
        return any(overlaps(read, path) for read in finding.reads for path in self.replaced)


def _by_key(
    root: type[BaseModel], errors: Sequence[ErrorDetails]
) -> dict[Pieces, list[ErrorDetails]]:
    """Gather errors by the key that they are about; a union reports one for each of its members."""
    found: dict[Pieces, list[ErrorDetails]] = {}
    for error in errors:
        pieces = _key_of(root, error["loc"])
        if error["type"] == "missing" and isinstance(pieces[-1], int):
            pieces = pieces[:-1]  # too few elements are a fault of the list
        found.setdefault(pieces, []).append(error)
    # Faulty elements are left out before pydantic counts, so that a list may be called too short besides.
    lists = {pieces[:-1] for pieces in found if isinstance(pieces[-1], int)}
    return {pieces: details for pieces, details in found.items() if pieces not in lists}


def _key_of(root: type[BaseModel], loc: Sequence[str | int]) -> Pieces:
    """Cut pydantic's names of union members off a location, e.g. ("shift", "literal['scheduler']").

    What follows the last name that the schema knows is kept only where it is a key of a section or an index of a list.
    """
    pieces: list[str | int] = []
    for piece in loc:
        slot = slot_at(root, tuple(pieces))
        assert slot is not None
        if isinstance(piece, int):
            if slot.element(piece) is not None:
                pieces.append(piece)
            continue
        section = section_class(slot.annotation)
        if section is None:
            continue
        pieces.append(piece)
        if piece not in section.model_fields:
            break
    return tuple(pieces)


def _booleans_as_numbers(
    node: object, root: type[BaseModel], pieces: Pieces
) -> Iterator[tuple[Pieces, object]]:
    """Every number that was given as true or false, which Python would take for 1 or 0."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _booleans_as_numbers(value, root, (*pieces, str(key)))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _booleans_as_numbers(value, root, (*pieces, index))
    elif isinstance(node, bool):
        slot = slot_at(root, pieces)
        if slot is not None and (slot.takes(int) or slot.takes(float)) and not slot.takes(bool):
            yield pieces, node
