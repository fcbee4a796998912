"""What a sweep asks for: the overrides that all points share, the keys that differ, and how the points are started."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from framework.compose.interpolation import resolve
from framework.compose.merge import apply_override
from framework.compose.messages import command_line, hydra_setting, unknown_option
from framework.compose.overrides import Words, parse_line, read_words
from framework.compose.provenance import Provenance, canonical_path
from framework.compose.repository import HYDRA_FOLDER, Repository, read_settings
from framework.compose.sweep_values import MAX_POINTS, Dimension, read_dimension
from framework.errors import Fault

_KINDS = ("launcher", "sweeper")
_DEFAULT_NAME = "basic"


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as it was typed, every fault of its form in one place.

    base: overrides that all points share.   dimensions: keys with several values.
    settings: {"launcher": {...}, "sweeper": {...}}, each with the `name` of the file that it comes from.
    where: what set each setting, by paths such as "hydra.launcher.n_jobs".
    """

    base: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    settings: dict[str, dict[str, Any]]
    where: Provenance
    faults: tuple[Fault, ...] = field(default=())

    @property
    def num_points(self) -> int:
        """How many points the product has; intervals count as one."""
        return math.prod(len(d.choices) for d in self.dimensions if d.choices is not None)

    def points(self) -> list[tuple[str, ...]]:
        """The whole list of overrides of each point, in product order: the last dimension changes fastest.

        Only for a sweep without intervals and without faults.
        """
        choices = [dimension.choices or () for dimension in self.dimensions]
        assert all(choices), "an interval has no list of points"
        return [(*self.base, *chosen) for chosen in itertools.product(*choices)]


def read_sweep(overrides: Sequence[str], *, config_dir: Path | None = None) -> SweepRequest:
    """Read a command line in which keys may hold several values.

    overrides: in Hydra's grammar: `a,b`, `choice(a,b)`, `range(1,9,2)`, `glob(*)` for options of a group,
    `interval(1e-5,1e-3)`, `tag(log, interval(...))`, `int(interval(...))`; `[1,2]` is one value, a list.
    Raises nothing for what a person wrote. The points themselves are judged by composing each: that tells what is wrong
    with a value, and a recipe or option that doesn't exist.
    """
    repository = Repository(config_dir)
    words = read_words(overrides, repository)
    # A choice of an option that doesn't exist stays in `base`, so that each point knows what it lacks.
    told_later = [fault for faults in words.faulty_choices.values() for fault in faults]
    faults = [fault for fault in words.faults if fault not in told_later]
    dimensions = []
    for override in words.sweeps:
        dimension, found = read_dimension(override, repository)
        faults += found
        if dimension is not None:
            dimensions.append(dimension)
    settings, where, found = _read_settings(words)
    faults += found
    request = SweepRequest(
        base=tuple(_base_lines(overrides, words)),
        dimensions=tuple(dimensions),
        settings=settings,
        where=where,
        faults=tuple(dict.fromkeys(faults)),
    )
    if request.num_points > MAX_POINTS:
        parts = " x ".join(str(len(d.choices)) for d in dimensions if d.choices)
        message = f"the sweep has {request.num_points:,} points ({parts}); at most {MAX_POINTS:,}"
        hint = "List fewer values, or search with hydra/sweeper=optuna."
        lines = " ".join(dimension.line for dimension in dimensions)
        fault = Fault("", message, command_line(lines), hint=hint, code="sweep")
        request = replace(request, faults=(*request.faults, fault))
    return request


def override_text(key: str, value: object) -> str:
    """Write `key=value` so that any text survives, also one with commas, brackets or quotes."""
    if isinstance(value, str):
        plain = f"{key}={value}"
        try:
            parsed = parse_line(plain)
            if not parsed.is_sweep_override() and parsed.value() == value:
                return plain
        except Exception as error:  # noqa: BLE001  whatever the parser says, quotes help
            del error
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return f"{key}={Override._get_value_element_as_str(value)}"  # type: ignore[arg-type]


def replace_overrides(overrides: Sequence[str], changes: Mapping[str, object]) -> list[str]:
    """Set keys anew: overrides of these keys are taken out and `key=value` is added at the end.

    changes: value by dotted path, e.g. {"run.name": "00-lr-1e-4"}.
    """
    kept = [line for line in overrides if line.partition("=")[0].lstrip("+~") not in changes]
    return [*kept, *(override_text(key, value) for key, value in changes.items())]


def _base_lines(overrides: Sequence[str], words: Words) -> Iterator[str]:
    """What all points share, as typed and in that order."""
    shared = {str(override.input_line) for override in (*words.groups, *words.keys)}
    shared |= set(words.faulty_choices)
    for line in overrides:
        if str(line) in shared:
            yield str(line)


def _read_settings(words: Words) -> tuple[dict[str, dict[str, Any]], Provenance, list[Fault]]:
    """The launcher and the sweeper with their settings."""
    where, faults = Provenance(), list[Fault]()
    config = OmegaConf.create({HYDRA_FOLDER: {}})
    chosen = dict.fromkeys(_KINDS, (_DEFAULT_NAME, ""))
    keys: list[Override] = []
    for override in words.settings:
        fault = _choose(override, chosen, keys)
        if fault is not None:
            faults.append(fault)
    for kind, (name, line) in chosen.items():
        faults += _add_file(config, where, kind, name, line)
    for override in keys:
        fault = apply_override(config, override)
        if fault is None:
            where.add_override(override.get_key_element(), str(override.input_line))
        else:
            faults.append(fault)
    values, broken, _ = resolve(config, where)
    below = values.get(HYDRA_FOLDER) or {}
    settings = {kind: dict(below.get(kind) or {}) for kind in _KINDS}
    for kind, (name, _) in chosen.items():
        settings[kind].setdefault("name", name)
    return settings, where, [*faults, *broken]


def _choose(
    override: Override, chosen: dict[str, tuple[str, str]], keys: list[Override]
) -> Fault | None:
    """Sort one setting into the choice of a launcher or sweeper, or its keys; else a fault."""
    key, line, value = override.key_or_group, str(override.input_line), override.value()
    where = command_line(line)
    kind = key.removeprefix(f"{HYDRA_FOLDER}/")
    if override.is_sweep_override():
        message = "holds several values, but all points of a sweep share its settings"
        hint = f"Write {key}=VALUE."
        return Fault(canonical_path(key), message, where, hint=hint, code="sweep")
    if kind in _KINDS:
        if override.is_delete() or not isinstance(value, str) or not value:
            names = read_settings(kind, "")[1]
            return unknown_option(key, line.partition("=")[2], names, where)
        chosen[kind] = (value, line)
        return None
    for name in _KINDS:
        start = f"{HYDRA_FOLDER}.{name}"
        if key.startswith(f"{start}.") or (key == start and isinstance(value, dict)):
            keys.append(override)
            return None
        if key == start:
            hint = f"Write hydra/{name}={line.partition('=')[2]}."
            message = f"a {name} is chosen with a slash"
            return Fault(key, message, where, (f"hydra/{name}",), hint, "hydra-setting")
    hint = (
        "Of Hydra's settings a sweep takes hydra/launcher, hydra/sweeper, hydra.launcher.KEY and "
        "hydra.sweeper.KEY; use run.name and run.output_dir for where it is written."
    )
    return hydra_setting(key, where, hint=hint)


def _add_file(
    config: DictConfig, where: Provenance, kind: str, name: str, line: str
) -> list[Fault]:
    """Put the file of a launcher or sweeper under its key. Changes `config` and `where`."""
    file, names = read_settings(kind, name)
    path = f"{HYDRA_FOLDER}.{kind}"
    config[HYDRA_FOLDER][kind] = {}
    if file is None:
        if not line:
            return []
        return [unknown_option(f"{HYDRA_FOLDER}/{kind}", name, names, command_line(line))]
    config[HYDRA_FOLDER][kind] = file.config
    where.add_file(file, path)
    return list(file.faults)
