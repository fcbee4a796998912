"""`octavo plan --fit`: which settings were tried for a device of a given size, and which to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framework.plan.fit import Fit, Limits, Trial, find_shortfall, override_lines
from framework.plan.table import format_bytes, plan_json, render_plan
from framework.plan.types import PhasePlan
from framework.runtime.fitting import fit_run
from framework.schema.run import RunConfig

_MAX_TRIALS = 14


def fit_device(name: str) -> str:
    """The device whose size is given: `auto` means a GPU, since only there is memory counted in cards."""
    return "cuda" if name == "auto" else name


def run_fit(config: RunConfig) -> Fit:
    """Find settings for `model.fit`.   Imports torch, which traces activations; reads headers only."""
    return fit_run(config, device=fit_device(config.model.device))


def render_fit(fit: Fit) -> RenderableType:
    """Lay the trials out as a table, then what to write, then the plan; or why nothing fits."""
    parts: list[RenderableType] = [_title(fit), _trials_table(fit)]
    if fit.chosen is not None and fit.plan is not None:
        return Group(*parts, _chosen(fit), render_plan(fit.plan))
    return Group(*parts, _nothing(fit))


def fit_json(fit: Fit) -> str:
    """Dump as JSON: the keys of `octavo plan --json` for the chosen plan, and `fit`.

    fit: fits (bool), device_bytes, usable_bytes, host_bytes (null: no limit), kept (paths), chosen (path -> value),
    overrides, trials [{settings, cost, fits, traced, phases {name: {device_bytes, host_bytes}}}], and shortfall
    {phase, memory, excess_bytes, part, part_bytes, way} where nothing fits, in which case the plan's keys are left out.
    """
    summary: dict[str, Any] = {} if fit.plan is None else json.loads(plan_json(fit.plan))
    return json.dumps({**summary, "fit": _summary(fit)}, indent=2)


def _summary(fit: Fit) -> dict[str, Any]:
    limits = fit.limits
    summary: dict[str, Any] = {
        "fits": fit.chosen is not None,
        "device_bytes": limits.size_bytes,
        "usable_bytes": limits.device_bytes,
        "host_bytes": limits.host_bytes,
        "kept": [f"model.{path}" for path in sorted(fit.kept)],
        "chosen": None if fit.chosen is None else _full(fit.chosen.keys),
        "overrides": fit.overrides,
        "trials": [_trial_summary(trial) for trial in fit.trials],
    }
    if fit.chosen is None:
        short = find_shortfall(fit)
        summary["shortfall"] = {
            "closest": _full(short.trial.keys),
            "phase": short.phase.name,
            "memory": short.memory,
            "excess_bytes": short.excess_bytes,
            "part": short.part,
            "part_bytes": short.part_bytes,
            "way": short.way,
        }
    return summary


def _trial_summary(trial: Trial) -> dict[str, Any]:
    return {
        "settings": _full(trial.keys),
        "cost": round(trial.cost, 3),
        "fits": trial.fits,
        "traced": trial.traced,
        "phases": {
            phase.name: {"device_bytes": phase.device_bytes, "host_bytes": phase.host_bytes}
            for phase in trial.phases
        },
    }


def _full(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.{path}": value for path, value in keys.items()}


def _title(fit: Fit) -> Text:
    limits = fit.limits
    title = Text(f"Settings for {format_bytes(limits.size_bytes)}", style="bold")
    if limits.device_bytes != limits.size_bytes:
        title.append(f", of which tensors may take {format_bytes(limits.device_bytes)}")
    if limits.shared:
        title.append(", device and host together")
    elif limits.host_bytes is not None:
        title.append(f", and {format_bytes(limits.host_bytes)} of host memory")
    return title


def _trials_table(fit: Fit) -> Table:
    """One line for each trial: what it changes, what it costs, and the peak of each phase."""
    names = [phase.name for phase in fit.trials[0].phases]
    table = Table(box=box.SIMPLE, pad_edge=False, title="Tried, the cheapest first")
    table.title_justify, table.title_style = "left", "italic"
    table.add_column("settings", overflow="fold")
    for name in ("cost", *names, "host"):
        table.add_column(name, justify="right", no_wrap=True)
    trials = fit.trials
    shown = trials[: _MAX_TRIALS - 1] + trials[-1:] if len(trials) > _MAX_TRIALS else trials
    for trial in shown:
        by_name = {phase.name: phase for phase in trial.phases}
        cells = [_device_cell(trial, by_name[name]) for name in names]
        style = "bold" if trial is fit.chosen else ""
        words = Text(_in_words(trial), style)
        table.add_row(words, f"{trial.cost:.2f}", *cells, _host_cell(trial))
    if len(shown) < len(trials):
        table.caption = f"{len(trials) - len(shown)} more were tried that don't fit either."
    return table


def _device_cell(trial: Trial, phase: PhasePlan) -> Text:
    used = phase.device_bytes + (phase.host_bytes if trial.limits.shared else 0)
    return _cell(used, used > trial.limits.device_bytes, traced=trial.traced)


def _host_cell(trial: Trial) -> Text:
    limits: Limits = trial.limits
    used = max(phase.host_bytes for phase in trial.phases)
    over = limits.host_bytes is not None and used > limits.host_bytes
    return _cell(used, over, traced=True)


def _cell(used: int, over: bool, *, traced: bool) -> Text:
    """A peak; ">" where only weights were counted, "!" where it is too much."""
    text = f"{'' if traced else '>'}{format_bytes(used)}{' !' if over else ''}"
    return Text(text, "red" if over else "")


def _in_words(trial: Trial) -> str:
    """What a trial changes, e.g. "dit fp8, checkpointed, from host by block; vram_limit 22.7"."""
    groups: dict[str, list[str]] = {}
    for path, value in trial.keys.items():
        name, _, key = path.rpartition(".")
        words = {
            "precision": f"{value}",
            "gradient_checkpointing": "checkpointed" if value else "not checkpointed",
            "offload": "on device" if value == "none" else f"from {value}",
            "granularity": f"by {value}",
            "vram_limit": f"vram_limit {value}",
        }[key]
        groups.setdefault(name, []).append(words)
    return "; ".join(f"{name} {', '.join(words)}".strip() for name, words in groups.items()) or (
        "as configured"
    )


def _chosen(fit: Fit) -> Text:
    text = Text()
    if fit.overrides:
        text.append("Chosen; `model.fit` takes these by itself, or write them:\n", "bold")
        text.append("".join(f"  {line}\n" for line in fit.overrides))
    else:
        text.append("It fits as configured.\n", "bold")
    if fit.kept:
        kept = ", ".join(f"model.{path}" for path in sorted(fit.kept))
        text.append(f"Kept, because a file or an override sets them: {kept}\n", "dim")
    return text


def _nothing(fit: Fit) -> Text:
    short = find_shortfall(fit)
    settings = " ".join(override_lines(short.trial.keys)) or "the settings as they are"
    text = Text("Nothing fits.\n", "bold red")
    text.append(f"Closest: {settings}\n")
    text.append(
        f"There, {short.phase.name} needs {format_bytes(short.excess_bytes)} more of {short.memory} memory; "
        f"its largest part is {short.part}, {format_bytes(short.part_bytes)}.\n"
    )
    text.append(f"What would help: {short.way}\n")
    return text
