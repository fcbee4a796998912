"""Which weights of an offloaded component are fetched together, and how they lie side by side in memory.

A *parcel* is one run of bytes that is copied at once: a layer's weight, or the weights of a block. A *unit* is what is
brought to the device together: one parcel, or all of a component.
"""

from __future__ import annotations

import re
from math import prod

from framework.plan.types import (
    BYTES_PER_ELEMENT,
    SAFETENSORS_NAMES,
    ComponentPlan,
    Frozen,
    Granularity,
    Place,
    TensorGroup,
    TensorPlan,
    scale_bytes,
    scale_shape,
)

# Every tensor in a parcel begins at a multiple of this, which serves all number formats and CUDA's widest loads.
ALIGNMENT_BYTES = 256
_BLOCK = re.compile(r"(.*?\.\d+)\.")


class SlotPlan(Frozen):
    """Where one weight lies in its parcel.

    offset: of the values, bytes.   scale_offset: of the float32 scale; None where there is none.
    """

    tensor: TensorPlan
    group: str
    offset: int
    scale_offset: int | None


class ParcelPlan(Frozen):
    """Weights that lie side by side.   num_bytes: with the gaps that alignment leaves."""

    name: str
    slots: tuple[SlotPlan, ...]
    num_bytes: int


class UnitPlan(Frozen):
    """Parcels that are fetched together."""

    name: str
    parcels: tuple[ParcelPlan, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that the unit takes where it is."""
        return sum(parcel.num_bytes for parcel in self.parcels)


def component_units(part: ComponentPlan) -> tuple[UnitPlan, ...]:
    """Units of a component in the order of the plan, which is that of the files; empty where nothing is offloaded."""
    gathered: dict[str, list[tuple[TensorGroup, TensorPlan]]] = {}
    moving = [(group, tensor) for group in part.groups if group.moves for tensor in group.tensors]
    for group, tensor in moving:
        gathered.setdefault(_parcel_name(tensor.layer, part.granularity), []).append(
            (group, tensor)
        )
    parcels = tuple(_parcel(name, members) for name, members in gathered.items())
    if part.granularity == "model":
        return (UnitPlan(name=part.name, parcels=parcels),) if parcels else ()
    return tuple(
        UnitPlan(name=f"{part.name}.{parcel.name}", parcels=(parcel,)) for parcel in parcels
    )


def bytes_at(part: ComponentPlan, place: Place) -> int:
    """Bytes of the component's own weights that rest at a place while the component is used.

    What is fetched for use comes on top of those on the device.
    """
    if place == "device":
        return sum(group.resting_bytes for group in part.groups if not group.moves)
    return sum(unit.num_bytes for unit in component_units(part)) if part.offload == place else 0


def rests_as_published(part: ComponentPlan) -> bool:
    """Whether the files hold the weights in the form in which they rest, so that nothing need be converted."""
    return all(
        tensor.source_dtype == SAFETENSORS_NAMES[group.states.offload.storage_dtype]
        and (tensor.excerpt is None or tensor.excerpt.order == "as_stored")
        and _has_scale(group, tensor)
        for group in part.groups
        for tensor in group.tensors
    )


def _has_scale(group: TensorGroup, tensor: TensorPlan) -> bool:
    wanted = scale_shape(tensor.shape, group.scaling, group.block_shape)
    scale = tensor.published_scale
    if wanted is None:
        return scale is None
    return scale is not None and scale.source_dtype == "F32" and prod(scale.shape) == prod(wanted)


def block_name(layer: str) -> str:
    """Name of the block that a layer is part of (`transformer_blocks.3`); a layer outside of blocks is its own."""
    found = _BLOCK.match(f"{layer}.")
    return found[1] if found else layer


def _parcel_name(layer: str, granularity: Granularity) -> str:
    return layer if granularity == "layer" else block_name(layer)


def _parcel(name: str, members: list[tuple[TensorGroup, TensorPlan]]) -> ParcelPlan:
    slots = []
    end = 0
    for group, tensor in members:
        offset = _aligned(end)
        end = offset + prod(tensor.shape) * BYTES_PER_ELEMENT[group.states.offload.storage_dtype]
        scale = scale_bytes(tensor.shape, group.scaling, group.block_shape)
        scale_offset = _aligned(end) if scale else None
        if scale_offset is not None:
            end = scale_offset + scale
        slots.append(
            SlotPlan(tensor=tensor, group=group.name, offset=offset, scale_offset=scale_offset)
        )
    return ParcelPlan(name=name, slots=tuple(slots), num_bytes=_aligned(end))


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
