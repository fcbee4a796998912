"""Judges whole configurations: composition, schema and files in one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from framework.compose import Composer, Composition, Provenance
from framework.errors import ConfigError, Fault
from framework.judge.disk import check_files
from framework.schema.run import RunConfig
from framework.schema.validate import Use, examine_values

Files = Literal["need", "local"]


@dataclass(frozen=True)
class Verdict:
    """What is known of one configuration.

    name: of the run, or its recipe's where the configuration has faults.
    overrides: as typed.   config: None where there are faults.
    checked_layers: whether patterns of layer names were held against the checkpoint, which must be on this disk.
    """

    name: str
    overrides: tuple[str, ...]
    config: RunConfig | None
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    where: Provenance
    checked_layers: bool = False

    def valid_config(self) -> RunConfig:
        """The configuration. Raises ConfigError with every fault where it has some."""
        if self.config is None:
            raise ConfigError(self.faults)
        return self.config


def judge_run(
    overrides: Sequence[str],
    *,
    use: Use,
    config_dir: Path | None = None,
    files: Files = "need",
) -> Verdict:
    """Judge the configuration that recipe and overrides describe. Raises nothing for what a person wrote.

    use: what it is for; generating trains nothing and planning needs no data.
    config_dir: a folder of recipes that is searched first.
    files: with "need", data and checkpoints to resume from must exist; with "local" their absence is a warning, because
    a configuration is often checked on another machine. Nothing is ever fetched.
    """
    return judge_points([overrides], use=use, config_dir=config_dir, files=files)[0]


def judge_points(
    points: Iterable[Sequence[str]],
    *,
    use: Use,
    config_dir: Path | None = None,
    files: Files = "local",
    on_judged: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Judge several configurations, in order; files that they share are read once.

    on_judged: called after each, e.g. to move a progress bar.
    """
    verdicts = []
    with Composer(config_dir=config_dir) as composer:
        for overrides in points:
            verdict = _judge(composer.compose(overrides), tuple(overrides), use, files)
            verdicts.append(verdict)
            if on_judged is not None:
                on_judged(verdict)
    return verdicts


def _judge(composition: Composition, overrides: tuple[str, ...], use: Use, files: Files) -> Verdict:
    where = composition.where
    found = examine_values(composition.values, where, use=use)
    faults, warnings = [*found.faults], [*composition.warnings, *found.warnings]
    checked_layers = False
    if composition.complete:
        unknown = {*found.stand_ins, *composition.left_out}
        need = files == "need"
        check = check_files(found.repaired, where, use=use, need=need, stand_ins=unknown)
        faults, warnings = [*faults, *check.faults], [*warnings, *check.warnings]
        checked_layers = check.checked_layers
    faults = [*composition.faults, *filter(composition.keeps, faults)]
    warnings = [*filter(composition.keeps, warnings)]
    faults = list(dict.fromkeys(located(fault, where) for fault in faults))
    return Verdict(
        name=_name(found.repaired, overrides),
        overrides=overrides,
        config=None if faults else found.repaired,
        faults=tuple(faults),
        warnings=tuple(dict.fromkeys(located(fault, where) for fault in warnings)),
        where=where,
        checked_layers=checked_layers,
    )


def located(fault: Fault, where: Provenance) -> Fault:
    """Say which line or override set the key, where the fault doesn't say it itself; nothing sets a missing key."""
    if fault.where or not fault.path or fault.code == "missing-key":
        return fault
    return replace(fault, where=where(fault.path))


def _name(config: RunConfig, overrides: Sequence[str]) -> str:
    recipes = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("recipe=")]
    if recipes:
        return recipes[-1]
    return config.run.name
