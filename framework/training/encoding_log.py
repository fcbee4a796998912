"""Says at a run's start what FP8 costs in accuracy, and keeps it in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from framework.atomic import write_text
from framework.models import Family
from framework.plan.build import build_run_plan
from framework.plan.types import ComponentPlan, VramPlan
from framework.runtime.devices import resolve_compute_dtype
from framework.runtime.encoding_error import OutputProbe, SourceWeights
from framework.runtime.encoding_report import (
    EncodingReport,
    read_report,
    read_reports,
    remembered,
    report_json,
    write_report,
)
from framework.runtime.error_budget import measure_component, measure_output, resolve_error_budget
from framework.schema import RunConfig
from framework.training.lifecycle import RunLifecycle
from framework.training.progress import show_log
from framework.training.run_folder import RunStart

ERROR_FILE = "encoding_error.json"

log = logging.getLogger("octavo")


def plan_within_budget(
    config: RunConfig, plan: VramPlan, family: Family, *, device: torch.device, start: RunStart
) -> tuple[VramPlan, EncodingReport | None]:
    """Keep as many of the DiT's layers in high precision as its `fp8.error_budget` needs.

    plan: without them; returned as it is where no budget is set.   start: a run that goes on keeps what it kept.
    Returns the plan to carry out and what was measured for the budget.   Raises PlanError where it can't be met.
    """
    earlier = [] if start.folder is None else read_reports(start.folder / ERROR_FILE)
    with show_log():
        model, report = resolve_error_budget(
            config.model,
            family,
            device=device,
            compute_dtype=resolve_compute_dtype(config.model.compute_dtype, device),
            folder=cache_folder(config),
            known=next((each for each in earlier if each.budget is not None), None),
        )
    if report is None:
        return plan, None
    return build_run_plan(config.model_copy(update={"model": model}), device=plan.device), report


def cache_folder(config: RunConfig) -> Path:
    """Where what was measured is kept for other runs."""
    return Path(config.data.cache_dir).expanduser() / "encoding_error"


class EncodingLog(pl.Callback):
    """Measures what wasn't measured for the error budget, once all components are in place; first process only.

    A run that goes on repeats what its first start measured: frozen weights haven't changed since.
    """

    def __init__(
        self,
        lifecycle: RunLifecycle,
        plan: VramPlan,
        family: Family,
        *,
        folder: Path,
        chosen: EncodingReport | None,
    ) -> None:
        """folder: where what was measured is kept for other runs.   chosen: the error budget's report."""
        self._lifecycle = lifecycle
        self._plan = plan
        self._family = family
        self._folder = folder
        self._chosen = chosen

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log one line for each component with FP8 weights."""
        encoded = [part for part in self._plan.components if SourceWeights.has_any(part)]
        if not trainer.is_global_zero or not encoded:
            return
        assert self._lifecycle.run_dir is not None
        file = self._lifecycle.run_dir / ERROR_FILE
        reports = read_reports(file)
        if not reports:
            reports = list(self._measure(encoded, pl_module))
            write_text(file, report_json(reports) + "\n")
        for report in reports:
            log.info("%s", report.summary)

    def _measure(self, encoded: list[ComponentPlan], module: Any) -> Iterator[EncodingReport]:
        for part in encoded:
            if self._chosen is not None and self._chosen.component == part.name:
                yield self._chosen
                continue
            with remembered(self._plan, part, self._folder) as file:
                report = read_report(file)
                if report is None:
                    report = self._measure_one(part, module)
                    write_report(file, report)
            yield report

    def _measure_one(self, part: ComponentPlan, module: Any) -> EncodingReport:
        if part.name == "dit" and part.name in module.components:
            probe = OutputProbe(module.components[part.name], SourceWeights(part), self._family)
            return measure_output(probe, shares=False)
        return measure_component(part, module.device)
