"""Shows a plan: tables for a person, JSON for a program."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from framework.errors import ConfigError, Fault
from framework.plan.phases import peak_phases
from framework.plan.types import ComponentPlan, TensorGroup, VramPlan

_PLACES = {"none": "", "host": " on host", "disk": " on disk"}
_DTYPE_NAMES = {"fp8_e4m3": "fp8", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}


def render_plan(plan: VramPlan) -> RenderableType:
    """Lay a plan out as tables: components, what of them trains, and phases; readable at 100 columns."""
    purpose = "training" if plan.purpose == "train" else "inference"
    title = Text(
        f"Plan for {purpose}: {plan.family}, {plan.compute_dtype} on {plan.device}", style="bold"
    )
    notes = Text(style="dim")
    sources: dict[str, list[str]] = {}
    for component in plan.components:
        revision = f" at {component.commit[:12]}" if component.commit else ""
        sources.setdefault(f"{component.source}{revision}", []).append(component.name)
    for source, names in sources.items():
        notes.append(f"{', '.join(names)}: {source}\n")
    notes.append(_working_note(plan))
    tables = [_component_table(plan)]
    if any(part.trained_numel for part in plan.components):
        tables.append(_training_table(plan))
    return Group(title, *tables, _phase_table(plan), notes)


def layers_table(plan: VramPlan, component: str) -> RenderableType:
    """List the layers of one component with their kind, shape, storage and adapter.

    Raises ConfigError for a component that the plan doesn't load.
    """
    if not plan.has(component):
        names = tuple(part.name for part in plan.components)
        raise ConfigError([Fault("", f'the plan loads no component "{component}"', nearest=names)])
    part = plan.component(component)
    adapted = {layer.name for layer in part.lora.layers} if part.lora else set()
    table = _table(
        "layer", ">shape", "kind", "stored as", "adapter", title=f"Layers of {component}"
    )
    for group in part.groups:
        for tensor in group.tensors:
            if tensor.kind != "other":
                rank = f"rank {part.lora.rank}" if part.lora and tensor.layer in adapted else ""
                shape = "x".join(str(size) for size in tensor.shape)
                table.add_row(tensor.layer, shape, tensor.kind, _storage_name(group), rank)
    return table


def plan_json(plan: VramPlan) -> str:
    """Dump the plan as JSON, sums instead of single tensors; keys stay the same from version to version."""
    return json.dumps(plan_summary(plan), indent=2)


def plan_summary(plan: VramPlan) -> dict[str, Any]:
    """The content of `plan_json`: bytes are whole numbers, names those of the configuration."""
    on_device, on_host = peak_phases(plan)
    return {
        "purpose": plan.purpose,
        "family": plan.family,
        "compute_dtype": plan.compute_dtype,
        "device": plan.device,
        "vram_limit_bytes": plan.vram_limit_bytes,
        "traced_with": None
        if plan.traced_with is None
        else plan.traced_with.model_dump(mode="json"),
        "components": {part.name: _component_summary(part) for part in plan.components},
        "phases": {
            phase.name: {
                "components": list(phase.components),
                "device_bytes": phase.device_bytes,
                "host_bytes": phase.host_bytes,
                "kept_bytes": phase.kept_bytes,
                "device": phase.device.by_name(),
                "host": phase.host.by_name(),
            }
            for phase in plan.phases
        },
        "peak": {"device_bytes": on_device.device_bytes, "host_bytes": on_host.host_bytes},
    }


def format_bytes(count: int) -> str:
    """Write a number of bytes with three digits and a binary unit: "38.1 GiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{count} B"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def format_count(count: int) -> str:
    """Write a number of parameters: "20.4 B", "163.8 M", "6144"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 10 * size or (unit != "k" and count >= size):
            return f"{count / size:.1f} {unit}"
    return str(count)


def _component_table(plan: VramPlan) -> Table:
    table = _table(
        "component", ">parameters", "stored as", ">at rest", "trains", title="Components"
    )
    for part in plan.components:
        table.add_row(
            part.name,
            format_count(part.numel),
            _storage_of(part),
            f"{format_bytes(part.resting_bytes)}{_PLACES[part.offload]}",
            _trains(part),
        )
    return table


def _training_table(plan: VramPlan) -> Table:
    table = _table(
        "component", ">parameters", ">weights", ">gradients", ">optimizer", ">average", ">sum",
        title="What trains",
    )  # fmt: skip
    for part in plan.components:
        if part.trained_numel:
            weights = part.resting_bytes if part.trainable == "full" else part.adapter_bytes
            parts = (weights, part.gradient_bytes, part.optimizer_bytes, part.ema_bytes)
            table.add_row(
                part.name,
                format_count(part.trained_numel),
                *(format_bytes(count) if count else "-" for count in parts),
                format_bytes(sum(parts)),
            )
    return table


def _phase_table(plan: VramPlan) -> Table:
    table = _table(
        "phase", "components", ">weights", ">trains", ">fetched", ">working", f">{plan.device}", ">host",
        title="Memory by phase",
    )  # fmt: skip
    for phase in plan.phases:
        parts = phase.device
        trains = parts.adapters + parts.gradients + parts.optimizer + parts.average
        working = None if parts.activations is None else parts.activations + parts.staging
        table.add_row(
            phase.name,
            ", ".join(phase.components),
            *(
                format_bytes(count) if count else "-"
                for count in (parts.weights, trains, parts.fetched)
            ),
            "?" if working is None else format_bytes(working) if working else "-",
            format_bytes(phase.device_bytes),
            format_bytes(phase.host_bytes) if phase.host_bytes else "-",
        )
    table.add_section()
    peak = plan_summary(plan)["peak"]
    sums = (format_bytes(peak["device_bytes"]), format_bytes(peak["host_bytes"]))
    table.add_row("peak", "", "", "", "", "", *sums, style="bold")
    return table


def _working_note(plan: VramPlan) -> str:
    """Say what `working` is, and what it was worked out for."""
    used = plan.traced_with
    if used is None:
        return (
            "Bytes of weights and of what training adds to them; activations come on top. "
            "Leave out --no-activations to have them traced."
        )
    pictures = f"{used.batch_size} x {_size(used.size_px)}" if used.size_px else "one at a time"
    samples = f", samples of {_size(used.sample_size_px)}" if used.sample_size_px else ""
    limit = plan.vram_limit_bytes
    below = f" Fetched weights are kept below {format_bytes(limit)}." if limit is not None else ""
    return (
        "working: activations, and what loading and saving hold on the way; traced for pictures of "
        f"{pictures} px{samples}, captions of up to {used.text_tokens} tokens.{below}"
    )


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]}x{size_px[1]}"


def _table(*columns: str, title: str) -> Table:
    """A plain table; a column whose name begins with ">" is right-aligned."""
    table = Table(
        title=title, title_justify="left", title_style="italic", box=box.SIMPLE, pad_edge=False
    )
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, overflow="fold")
    return table


def _storage_name(group: TensorGroup) -> str:
    name = _DTYPE_NAMES[group.states.onload.storage_dtype]
    scales = {
        "row": " (row scales)",
        "block": " (block scales)",
        "tensor": " (one scale)",
        "none": " (no scale)",
        None: "",
    }
    return name + scales[group.scaling]


def _storage_of(part: ComponentPlan) -> str:
    """`fp8 97 %, bf16 3 %`: shares of the parameters, so that what stays in high precision is seen."""
    shares: dict[str, int] = {}
    for group in part.groups:
        name = _DTYPE_NAMES[group.states.onload.storage_dtype]
        shares[name] = shares.get(name, 0) + group.numel
    total = sum(shares.values()) or 1
    if len(shares) == 1:
        return next(iter(shares))
    return ", ".join(f"{name} {100 * numel / total:.0f} %" for name, numel in shares.items())


def _trains(part: ComponentPlan) -> str:
    if part.lora is not None:
        kind = "DoRA" if part.lora.use_dora else "LoRA"
        text = f"{kind} r={part.lora.rank}, {len(part.lora.layers)} layers"
        return text if part.trainable == "lora" else f"no ({text} loaded)"
    return "all" if part.trainable == "full" else "no"


def _component_summary(part: ComponentPlan) -> dict[str, Any]:
    return {
        "source": part.source,
        "folder": part.folder,
        "commit": part.commit,
        "trainable": part.trainable,
        "parameters": part.numel,
        "resting_bytes": part.resting_bytes,
        "trained_parameters": part.trained_numel,
        "adapter_bytes": part.adapter_bytes,
        "gradient_bytes": part.gradient_bytes,
        "optimizer_bytes": part.optimizer_bytes,
        "ema_bytes": part.ema_bytes,
        "gradient_checkpointing": part.gradient_checkpointing,
        "offload": part.offload,
        "granularity": part.granularity,
        "groups": {group.name: _group_summary(group) for group in part.groups},
        "lora": None
        if part.lora is None
        else {
            **part.lora.model_dump(exclude={"layers"}),
            "layers": [layer.name for layer in part.lora.layers],
        },
    }


def _group_summary(group: TensorGroup) -> dict[str, Any]:
    return {
        "tensors": len(group.tensors),
        "parameters": group.numel,
        "resting_bytes": group.resting_bytes,
        "scaling": group.scaling,
        "trains": group.trains,
        "states": group.states.model_dump(),
    }
