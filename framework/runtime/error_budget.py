"""Which layers stay in high precision so that FP8's error of the DiT's output holds `fp8.error_budget`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, log10
from pathlib import Path

import torch
from torch import nn

from framework.errors import PlanError
from framework.models import Family
from framework.plan.build import build_plan
from framework.plan.match import matches_any
from framework.plan.types import ComponentPlan, VramPlan
from framework.runtime.encoding_error import (
    OutputProbe,
    SourceWeights,
    measure_weights,
    relative_error,
)
from framework.runtime.encoding_report import (
    DEFAULT_FOLDER,
    EncodingReport,
    read_report,
    remembered,
    write_report,
)
from framework.runtime.residency import Residency
from framework.schema.families import FAMILIES
from framework.schema.model import ModelConfig

_MEASURED = "dit"

log = logging.getLogger("octavo")


def resolve_error_budget(
    model: ModelConfig,
    family: Family,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    folder: Path = DEFAULT_FOLDER,
    known: EncodingReport | None = None,
) -> tuple[ModelConfig, EncodingReport | None]:
    """Turn `model.dit.fp8.error_budget` into names of layers, in `model.dit.fp8.keep_high_precision`.

    folder: where what was measured is kept.   known: what an earlier start of the same run chose; taken as it is.
    Returns the configuration to plan with and the report, or `model` itself and None where no budget is set.
    The encoded DiT is loaded and dropped again, unless the choice is known already.
    Raises PlanError where the budget can't be met while any layer is stored in FP8.
    """
    config = model.components[_MEASURED]
    budget = config.fp8.error_budget
    if budget is None or config.precision != "fp8":
        return model, None
    plan = _plan_alone(model, device)
    part = plan.component(_MEASURED)
    if known is None or known.budget != budget:
        with remembered(plan, part, folder, budget=budget) as file:
            known = read_report(file)
            if known is None:
                log.info("measuring which layers of the dit FP8 costs most, for fp8.error_budget")
                with _loaded(plan, family, device, compute_dtype) as dit:
                    known = _choose(OutputProbe(dit, SourceWeights(part), family), budget)
                write_report(file, known)
    return keep_layers(model, part, known.kept), known


def measure_encoding(
    model: ModelConfig,
    family: Family,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    folder: Path = DEFAULT_FOLDER,
) -> list[EncodingReport]:
    """Measure every component with `precision: fp8`, the DiT with its output and each layer's share in its error.

    One component is in memory at a time, and of those that aren't loaded, one weight.   The budget is resolved too.
    """
    reports = []
    encoded = [name for name, part in model.components.items() if part.precision == "fp8"]
    for name in encoded:
        if name == _MEASURED:
            continue
        plan = _plan_of(model, (name,), device)
        reports.append(measure_component(plan.component(name), device))
    if _MEASURED in encoded:
        _, report = resolve_error_budget(
            model, family, device=device, compute_dtype=compute_dtype, folder=folder
        )
        if report is None:
            plan = _plan_alone(model, device)
            with _loaded(plan, family, device, compute_dtype) as dit:
                probe = OutputProbe(dit, SourceWeights(plan.component(_MEASURED)), family)
                report = measure_output(probe, shares=True)
        reports.append(report)
    return reports


def measure_component(part: ComponentPlan, device: torch.device) -> EncodingReport:
    """Compare the weights of a component that needn't be loaded."""
    layers = measure_weights(SourceWeights(part), device)
    return EncodingReport(component=part.name, layers=tuple(layers))


def measure_output(probe: OutputProbe, *, shares: bool) -> EncodingReport:
    """Compare weights and output of a loaded DiT.   shares: also each layer's share in the output's error."""
    reference = probe.reference()
    error = relative_error(probe.output(), reference)
    parts = probe.shares() if shares and error > 0 else {}
    layers = (
        probe.errors[name].model_copy(update={"output_share": parts.get(name)})
        for name in probe.source.layers
    )
    return EncodingReport(component=_MEASURED, layers=tuple(layers), output_error=error)


def keep_layers(model: ModelConfig, part: ComponentPlan, kept: tuple[str, ...]) -> ModelConfig:
    """Add layers to what a component keeps in high precision.   part: its plan without them."""
    if not kept:
        return model
    config = model.components[part.name]
    globs = config.fp8.keep_high_precision
    if globs is None:
        # The family's list, but only patterns that mean a layer of this checkpoint: a written one has to.
        layers = [tensor.layer for group in part.groups for tensor in group.tensors]
        family_globs = FAMILIES[model.family].components[part.name].keep_high_precision
        globs = tuple(g for g in family_globs if any(matches_any(name, [g]) for name in layers))
    fp8 = config.fp8.model_copy(update={"keep_high_precision": (*globs, *kept)})
    return model.model_copy(update={part.name: config.model_copy(update={"fp8": fp8})})


def _choose(probe: OutputProbe, budget: float) -> EncodingReport:
    """Find how many of the layers that cost most per byte have to be kept, by bisection."""
    whole = measure_output(probe, shares=True)
    before = whole.output_error
    assert before is not None
    # What a layer costs in accuracy, for each byte that FP8 saves on it.
    ranked = sorted(whole.layers, key=lambda e: -(e.output_share or 0.0) / e.numel)
    # Some take no part in the output (the text half of the last block): without them nothing would be judged.
    names = [layer.layer for layer in ranked if layer.output_share]
    found = {0: before}

    def error_with(count: int) -> float:
        if count not in found:
            found[count] = relative_error(probe.output(unencoded=names[:count]), probe.reference())
        return found[count]

    too_few, enough = 0, len(names) - 1
    if before <= budget:
        enough = 0
    elif error_with(enough) > budget:
        raise _unreachable(budget, before, error_with(enough), names)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if error_with(middle) <= budget:
            enough = middle
        else:
            too_few = middle
    return whole.model_copy(
        update={
            "budget": budget,
            "kept": tuple(names[:enough]),
            "output_error": error_with(enough),
            "output_error_before": before,
        }
    )


def _unreachable(budget: float, before: float, least: float, names: list[str]) -> PlanError:
    path = f"model.{_MEASURED}"
    return PlanError(
        f"{path}.fp8.error_budget={budget:g} can't be met while any layer of the {_MEASURED} is stored in FP8",
        found=f"the error of its output is {before:.3g}, and {least:.3g} with all but one of {len(names)} layers kept "
        "in high precision; rounding in the compute dtype alone can change the output that much",
        hint=f"set {path}.precision=bf16, or a budget of at least {_rounded_up(least)}",
    )


def _rounded_up(value: float) -> str:
    """Two significant digits, never less than `value`."""
    step = 10.0 ** (int(log10(value)) - 2) if value > 0 else 1.0
    return f"{ceil(value / step) * step:.3g}"


# ---- the DiT alone -------------------------------------------------------------------------------


def _plan_of(model: ModelConfig, names: tuple[str, ...], device: torch.device) -> VramPlan:
    """The components frozen and without adapters.

    Converted weights aren't written of layers that may be chosen otherwise in the end, unless nothing else is read.
    """
    changes: dict[str, object] = {
        name: model.components[name].model_copy(update={"trainable": "none", "lora": None})
        for name in names
    }
    if all(model.components[name].offload != "disk" for name in names):
        changes["converted_dir"] = None
    return build_plan(
        model.model_copy(update=changes),
        purpose="infer",
        phases=("sample",),
        resident={"sample": names},
        device=str(device),
    )


def _plan_alone(model: ModelConfig, device: torch.device) -> VramPlan:
    return _plan_of(model, (_MEASURED,), device)


@contextmanager
def _loaded(
    plan: VramPlan, family: Family, device: torch.device, compute_dtype: torch.dtype
) -> Iterator[nn.Module]:
    residency = Residency(plan, family, device, compute_dtype)
    try:
        residency.enter("sample")
        yield residency.modules[_MEASURED]
    finally:
        residency.release()
