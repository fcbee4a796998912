"""What each phase of a run holds in device and host memory, by what it is for.

Everything here follows from the plan's components alone; what only the arithmetic decides (activations) is traced by
`framework.runtime.forecast` and put in by `with_traced`.

Phases: load (a component being read, at its most costly), encode (frozen encoders fill the cache), train (one optimizer
step in the steady state), sample (pictures amid training, or generation), save (a checkpoint or the result).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from framework.plan.types import (
    ComponentPlan,
    MemoryParts,
    Phase,
    PhasePlan,
    TracedWith,
    VramPlan,
)
from framework.plan.units import bytes_at, component_units


class TracedPhase(NamedTuple):
    """What a trace found of one phase: the parts of its highest moment, in each memory, without `fetched`.

    What is fetched, and what of it may stay, follows from the rest and is worked out here.
    """

    device: MemoryParts
    host: MemoryParts


def plan_phases(
    phases: Sequence[Phase],
    resident: Mapping[Phase, tuple[str, ...]],
    components: Sequence[ComponentPlan],
    *,
    device: str,
    vram_limit_bytes: int | None = None,
) -> tuple[PhasePlan, ...]:
    """Sum up what the phases hold, activations left open.

    phases: of the run, in its order, without load and save; resident: the components that each needs.
    Returns `load`, then these, then `save` where anything trains.
    """
    named = {part.name: part for part in components}
    held = {phase: [named[name] for name in resident[phase]] for phase in phases}
    ready = _ready_on_host(phases, held) if "train" in phases else []
    planned = [
        _used(
            phase,
            held[phase],
            ready if phase in ("train", "sample") else held[phase],
            device=device,
            vram_limit_bytes=vram_limit_bytes,
        )
        for phase in phases
    ]
    loads = [_load(phase, device) for phase in _entries(planned, held)]
    planned.insert(0, max(loads, key=lambda load: load.device_bytes + load.host_bytes))
    if "train" in phases:
        planned.append(_save(held["train"], ready, device))
    return tuple(planned)


def _ready_on_host(
    phases: Sequence[Phase], held: Mapping[Phase, Sequence[ComponentPlan]]
) -> list[ComponentPlan]:
    """What is in host memory all through training: components that rest there and that its phases come back to."""
    found = {
        part.name: part for phase in phases if phase in ("train", "sample") for part in held[phase]
    }
    return list(found.values())


def with_traced(
    plan: VramPlan, traced: Mapping[Phase, TracedPhase], traced_with: TracedWith
) -> VramPlan:
    """The plan with the traced parts of its phases in place of those that were worked out; others stay as they are."""
    phases = []
    for phase in plan.phases:
        found = traced.get(phase.name)
        if found is None:
            phases.append(phase)
            continue
        held = [plan.component(name) for name in phase.components]
        room = _room(plan.vram_limit_bytes, found.device.total_bytes)
        fetched = {"fetched": fetched_bytes(held, device=plan.device, room_bytes=room)}
        phases.append(
            phase.model_copy(
                update={
                    "device": found.device.model_copy(update=fetched),
                    "host": found.host,
                    "kept_bytes": kept_bytes(held, device=plan.device, room_bytes=room),
                }
            )
        )
    return plan.model_copy(update={"phases": tuple(phases), "traced_with": traced_with})


def peak_phases(plan: VramPlan) -> tuple[PhasePlan, PhasePlan]:
    """The phase with the highest device memory, and that with the highest host memory."""
    return (
        max(plan.phases, key=lambda phase: phase.device_bytes),
        max(plan.phases, key=lambda phase: phase.host_bytes),
    )


def _used(
    phase: Phase,
    held: Sequence[ComponentPlan],
    on_host: Sequence[ComponentPlan],
    *,
    device: str,
    vram_limit_bytes: int | None,
) -> PhasePlan:
    """A phase in which components compute: gradients exist while training, optimizer state and average from then on."""
    trains = phase == "train"
    after = phase != "encode"
    parts = MemoryParts(
        weights=sum(bytes_at(part, "device") for part in held),
        adapters=sum(part.adapter_bytes for part in held),
        gradients=sum(part.gradient_bytes for part in held) if trains else 0,
        optimizer=sum(part.optimizer_bytes for part in held) if after else 0,
        average=sum(part.ema_bytes for part in held) if after else 0,
    )
    room = _room(vram_limit_bytes, parts.total_bytes)
    fetched = fetched_bytes(held, device=device, room_bytes=room)
    return PhasePlan(
        name=phase,
        components=tuple(part.name for part in held),
        device=parts.model_copy(update={"fetched": fetched}),
        host=MemoryParts(weights=sum(bytes_at(part, "host") for part in on_host)),
        kept_bytes=kept_bytes(held, device=device, room_bytes=room),
    )


def stays_on_host(plan: VramPlan, name: str) -> bool:
    """Whether an offloaded component is held ready between the phases that need it.

    Training comes back to its phases `train` and `sample`; encoding, and all of a generation, happens once.
    """
    again = {
        component
        for phase in plan.phases
        if phase.name in ("train", "sample")
        for component in phase.components
    }
    return plan.purpose == "train" and name in again and plan.component(name).offload != "none"


def _room(limit_bytes: int | None, held_bytes: int) -> int:
    return 0 if limit_bytes is None else max(0, limit_bytes - held_bytes)


def fetched_bytes(held: Sequence[ComponentPlan], *, device: str, room_bytes: int) -> int:
    """Most bytes of fetched weights at once: what is in flight, beside what there is room to keep.

    room_bytes: what fetched weights may take.
    """
    total = _moving_bytes(held)
    return min(
        total,
        _most_in_flight(held, device) + kept_bytes(held, device=device, room_bytes=room_bytes),
    )


def kept_bytes(held: Sequence[ComponentPlan], *, device: str, room_bytes: int) -> int:
    """Bytes of units that may stay on the device: all if they fit, else what the units in flight leave."""
    total = _moving_bytes(held)
    if total <= room_bytes:
        return total
    return max(0, room_bytes - _most_in_flight(held, device))


def _moving_bytes(held: Sequence[ComponentPlan]) -> int:
    return sum(unit.num_bytes for part in held for unit in component_units(part))


def _most_in_flight(held: Sequence[ComponentPlan], device: str) -> int:
    return max((_in_flight(part, device) for part in held), default=0)


def _in_flight(part: ComponentPlan, device: str) -> int:
    """The unit in use, and the next one where fetching runs beside the arithmetic: from host memory on a GPU only."""
    ahead = part.granularity != "model" and (device.startswith("cuda") or part.offload == "disk")
    largest = sorted(unit.num_bytes for unit in component_units(part))[-(2 if ahead else 1) :]
    return sum(largest)


class _Entry(NamedTuple):
    """A phase as it is entered: what is held when its last component has been read."""

    phase: PhasePlan
    parts: Sequence[ComponentPlan]


def _entries(
    planned: Sequence[PhasePlan], held: Mapping[Phase, Sequence[ComponentPlan]]
) -> list[_Entry]:
    entries = []
    for phase in planned:
        # Optimizer and average begin with the first step, gradients are let go before components are changed.
        absent = {"gradients": 0, "fetched": 0}
        if phase.name == "train":
            absent |= {"optimizer": 0, "average": 0}
        entered = phase.model_copy(update={"device": phase.device.model_copy(update=absent)})
        entries.append(_Entry(entered, held[phase.name]))
    return entries


def _load(entry: _Entry, device: str) -> PhasePlan:
    """The phase's weights, and the largest tensor on its way: in the read buffer, and on a GPU to be encoded there."""
    largest = max((_largest_source_bytes(part) for part in entry.parts), default=0)
    on_device = 0 if device.startswith(("cpu", "mps")) else largest
    return PhasePlan(
        name="load",
        components=entry.phase.components,
        device=entry.phase.device.model_copy(update={"staging": on_device, "activations": 0}),
        host=entry.phase.host.model_copy(update={"staging": largest, "activations": 0}),
    )


def _largest_source_bytes(part: ComponentPlan) -> int:
    return max(
        (tensor.source_bytes for group in part.groups for tensor in group.tensors),
        default=0,
    )


def _save(
    held: Sequence[ComponentPlan], on_host: Sequence[ComponentPlan], device: str
) -> PhasePlan:
    """What the train phase holds between steps, and copies on the way to the file.

    With an average, one more copy of the trained weights is made while the average stands in their place. From a GPU
    the adapter comes to the host whole, and a component that trains in full tensor by tensor.
    """
    trained = [part for part in held if part.trained_numel]
    copies = sum(part.ema_bytes for part in trained)
    largest = max((_largest_trained_bytes(part) for part in trained), default=0)
    copied = largest
    if not device.startswith("cpu"):
        copied = max(largest, sum(part.adapter_bytes for part in trained))
    return PhasePlan(
        name="save",
        components=tuple(part.name for part in held),
        device=MemoryParts(
            weights=sum(bytes_at(part, "device") for part in held),
            adapters=sum(part.adapter_bytes for part in held),
            gradients=sum(part.gradient_bytes for part in held),
            optimizer=sum(part.optimizer_bytes for part in held),
            average=sum(part.ema_bytes for part in held),
            staging=copies,
            activations=0,
        ),
        host=MemoryParts(
            weights=sum(bytes_at(part, "host") for part in on_host),
            staging=copied,
            activations=0,
        ),
    )


def _largest_trained_bytes(part: ComponentPlan) -> int:
    """Largest tensor of a component that trains in full; it is written in the format that it was published in."""
    sizes = [
        tensor.source_bytes for group in part.groups if group.trains for tensor in group.tensors
    ]
    return max(sizes, default=0)
