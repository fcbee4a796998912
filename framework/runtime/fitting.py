"""Finds settings for `model.fit` with traced plans (`framework.plan.fit` decides)."""

from __future__ import annotations

import os
from pathlib import Path

from framework.models import get_family
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.fit import Evaluate, Fit, Limits, solve_fit
from framework.plan.fit_choices import inference_freedom, run_freedom
from framework.plan.phases import TracedPhase, with_traced
from framework.plan.types import VramPlan
from framework.runtime.forecast import (
    TEXT_TOKENS,
    forecast_inference,
    forecast_run,
    longest_caption,
)
from framework.schema.model import ModelConfig
from framework.schema.run import RunConfig
from framework.schema.sizes import read_size_bytes

_HOST_SHARE = 0.9
"""Share of this machine's memory that weights may take; the process and the system need the rest. A guess."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def fit_run(config: RunConfig, *, device: str) -> Fit:
    """Find the cheapest settings with which a training run fits `config.model.fit`.

    device: "cpu", "cuda:0", ...; a label, nothing is asked of it.   Reads headers, and captions where data is there.
    """
    text_tokens = longest_caption(config, get_family(config.model.family))

    def run_with(model: ModelConfig) -> RunConfig:
        return config.model_copy(update={"model": model})

    def outline(model: ModelConfig) -> VramPlan:
        return build_run_plan(run_with(model), device=device)

    def forecast(model: ModelConfig) -> VramPlan:
        return forecast_run(run_with(model), device=device, text_tokens=text_tokens)

    return solve_fit(
        config.model,
        limits=_limits(config.model, device, processes=config.trainer.devices),
        freedom=run_freedom(config, device=device),
        evaluate=_TracedOnce(forecast, outline),
        outline=outline,
    )


def fit_inference(
    model: ModelConfig,
    *,
    size_px: tuple[int, int],
    guided: bool,
    device: str,
    num_tokens: int = TEXT_TOKENS,
    num_frames: int = 1,
) -> Fit:
    """Find the cheapest settings with which a generation fits `model.fit`.

    size_px: width and height.   guided: whether classifier-free guidance is used.   num_tokens: of the longest prompt.
    num_frames: of a clip.
    """

    def outline(changed: ModelConfig) -> VramPlan:
        return build_inference_plan(changed, device=device)

    def forecast(changed: ModelConfig) -> VramPlan:
        return forecast_inference(
            changed,
            size_px=size_px,
            guided=guided,
            num_tokens=num_tokens,
            num_frames=num_frames,
            device=device,
        )

    return solve_fit(
        model,
        limits=_limits(model, device, processes=1),
        freedom=inference_freedom(model, device=device),
        evaluate=_TracedOnce(forecast, outline),
        outline=outline,
    )


class _TracedOnce:
    """Traces settings once for all limits of device memory, which say only how much of the weights is kept there."""

    def __init__(self, forecast: Evaluate, outline: Evaluate) -> None:
        self._forecast = forecast
        self._outline = outline
        self._found: dict[ModelConfig, VramPlan] = {}

    def __call__(self, model: ModelConfig) -> VramPlan:
        unlimited = model.model_copy(update={"vram_limit": None})
        found = self._found.get(unlimited)
        if found is None:
            found = self._found[unlimited] = self._forecast(unlimited)
        if model.vram_limit is None:
            return found
        traced = {
            phase.name: TracedPhase(phase.device.model_copy(update={"fetched": 0}), phase.host)
            for phase in found.phases
            if phase.name not in ("load", "save")
        }
        assert found.traced_with is not None
        return with_traced(self._outline(model), traced, found.traced_with)


def _limits(model: ModelConfig, device: str, *, processes: int) -> Limits:
    """processes: on this machine; each holds offloaded weights of its own, so they share its memory."""
    assert model.fit is not None
    size = read_size_bytes(model.fit, path="model.fit")
    if model.fit_host is not None:
        host: int | None = read_size_bytes(model.fit_host, path="model.fit_host")
    else:
        host = host_memory_bytes()
    return Limits.of(size, None if host is None else host // processes, device=device)


def host_memory_bytes() -> int | None:
    """What weights may take of this machine's memory, or of the container's; None where the system doesn't tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        allowed = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        allowed = total  # no container, or one without a limit
    return int(min(total, allowed) * _HOST_SHARE)
