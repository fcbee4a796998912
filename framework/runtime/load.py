"""Makes one component of a plan real: built on the meta device, streamed in, encoded, adapter attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from framework.errors import PlanError, SourceError
from framework.hub import fetch_place
from framework.inventory import StoredTensor, read_inventory
from framework.plan.types import (
    ComponentPlan,
    StorageDtype,
    TensorGroup,
    TensorPlan,
)
from framework.runtime.adapters import attach_lora_, is_adapter_name, load_lora_
from framework.runtime.streaming import read_tensors
from framework.storage.fp8 import encode_e4m3, has_nan_codes
from framework.storage.managed import ManagedWeight, convert_layer_

_STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


class ModuleBuilder(Protocol):
    """The one thing that loading asks of a model family (`framework.models.base.Family` has it)."""

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build a component from `folder/config.json`, weights not read."""
        ...


def load_component(
    plan: ComponentPlan,
    family: ModuleBuilder,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Load one component as the plan says, weights fetched from the hub first if they aren't on this machine.

    compute_dtype: what an FP8 weight is decoded to where nothing else decides (embeddings).
    seed: of the adapter's start values, which are the same for every device and every storage of the base.
    on_progress: called with the bytes read since the last call.
    Only what trains has requires_grad; a frozen component is in eval mode, one that trains in train mode.
    Memory: the resting bytes plus the largest tensor.
    Raises PlanError where checkpoint and module don't agree, SourceError for files that can't be used.
    """
    folder = fetch_place(plan.folder)
    # Trainers call this with the GPU as torch's default device; the read buffer and what the module computes of itself
    # (rotary frequencies) belong on the host, there and everywhere else.
    with torch.device("cpu"):
        module = _load_weights(
            plan,
            family,
            folder,
            device=device,
            compute_dtype=compute_dtype,
            on_progress=on_progress,
        )
        module.requires_grad_(plan.trainable == "full")
        module.train(plan.trainable == "full")
        if plan.lora is not None:
            attach_lora_(
                module, plan.lora, component=plan.name, seed=seed, trains=plan.trainable == "lora"
            )
            if plan.lora.init_from is not None:
                _start_from_file_(module, Path(plan.lora.init_from), plan.name)
    return module


def _load_weights(
    plan: ComponentPlan,
    family: ModuleBuilder,
    folder: Path,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    on_progress: Callable[[int], None] | None,
) -> nn.Module:
    """Build the module without weights and fill it tensor by tensor."""
    with init_empty_weights(include_buffers=False):
        module = family.build_module(plan.name, folder)
    sources = _match_files(plan, read_inventory(folder), folder)
    _check_complete(plan, module)
    for group in plan.groups:
        _prepare_group_(module, group, compute_dtype)
    planned = {source.key: pair for source, pair in sources}
    for stored, values in read_tensors(source for source, _ in sources):
        group, tensor = planned[stored.key]
        _place_(module, group, tensor, values, device)
        if on_progress is not None:
            on_progress(stored.num_bytes)
    _move_buffers_(module, device)
    return module


def _start_from_file_(module: nn.Module, path: Path, component: str) -> None:
    if not load_lora_(module, path.expanduser(), component):
        raise SourceError(
            f"the LoRA file holds no adapter for {component}",
            where=str(path),
            hint=f"correct model.{component}.lora.init_from, or unset it",
        )


def resting_bytes(module: nn.Module) -> int:
    """Bytes that the component's own weights take: parameters and persistent buffers, adapters not counted.

    Storage that several tensors share counts once.
    """
    seen: dict[int, int] = {}
    for name, tensor in _state(module):
        if not is_adapter_name(name):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the module; empty where no adapter is attached."""
    return {name: p for name, p in module.named_parameters() if is_adapter_name(name)}


def _state(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    persistent = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield name, buffer


def _match_files(
    plan: ComponentPlan, inventory: dict[str, StoredTensor], folder: Path
) -> list[tuple[StoredTensor, tuple[TensorGroup, TensorPlan]]]:
    """Pair planned tensors with the files as they are now; they must not have changed since the plan was made."""
    pairs = []
    for group in plan.groups:
        for tensor in group.tensors:
            stored = inventory.get(tensor.source_key)
            if stored is None or (stored.shape, stored.dtype) != (
                tensor.shape,
                tensor.source_dtype,
            ):
                found = f"{stored.dtype} {list(stored.shape)}" if stored else "no such tensor"
                raise PlanError(
                    f"the files of {plan.name} changed since the plan was made: {tensor.source_key}",
                    where=str(folder),
                    found=found,
                    hint="run the command again",
                )
            pairs.append((stored, (group, tensor)))
    return pairs


def _check_complete(plan: ComponentPlan, module: nn.Module) -> None:
    """The module and the checkpoint must hold the same tensors of the same shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _state(module)}
    offered = {tensor.name: tensor.shape for group in plan.groups for tensor in group.tensors}
    problems = [
        *(f"{name} is missing in the checkpoint" for name in wanted if name not in offered),
        *(f"{name} has no place in the module" for name in offered if name not in wanted),
        *(
            f"{name} is {list(offered[name])} in the checkpoint, {list(shape)} in the module"
            for name, shape in wanted.items()
            if name in offered and offered[name] != shape
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise PlanError(
            f"the weights of {plan.name} don't fit its config.json",
            where=plan.folder,
            found="; ".join(problems[:5]) + more,
            hint="the folder must hold config.json and weights of one and the same model",
        )


def _prepare_group_(module: nn.Module, group: TensorGroup, compute_dtype: torch.dtype) -> None:
    """Turn the layers of an FP8 group into managed ones, still on the meta device."""
    if group.scaling is None:
        return
    for tensor in group.tensors:
        try:
            layer = module.get_submodule(tensor.layer)
            convert_layer_(layer, scaling=group.scaling, weight_dtype=compute_dtype)
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"{tensor.layer}: {error}",
                hint="name the layer in fp8.keep_high_precision of its component",
            ) from error


def _place_(
    module: nn.Module, group: TensorGroup, tensor: TensorPlan, values: Tensor, device: torch.device
) -> None:
    """Copy one tensor out of the read buffer to where it rests."""
    owner = module.get_submodule(tensor.layer)
    leaf = tensor.name.rpartition(".")[2]
    if group.scaling is not None:
        assert isinstance(owner, ManagedWeight)
        owner.store_(*_encode(group, tensor, values, device))
        return
    storage_dtype = _STORAGE_DTYPES[group.states.onload.storage_dtype]
    resting = values.to(device=device, dtype=storage_dtype, copy=True)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(resting, requires_grad=group.trains)
    else:
        owner._buffers[leaf] = resting


def _encode(
    group: TensorGroup, tensor: TensorPlan, values: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Codes and scale on the device, encoded there. What is FP8 in the file is kept as it is."""
    # Apple's GPU knows no FP8: the host encodes for it.
    values = values.to("cpu" if device.type == "mps" else device)
    if group.scaling == "none" and tensor.source_dtype == "F8_E4M3":
        codes = values.view(torch.uint8).clone()
        if has_nan_codes(codes):
            raise PlanError(f"{tensor.source_key} holds NaN", where=tensor.file)
        return codes.to(device), None
    assert group.scaling is not None
    try:
        codes, scale = encode_e4m3(values, group.scaling)
        return codes.to(device), None if scale is None else scale.to(device)
    except ValueError as error:
        hint = "set fp8.scaling=row" if group.scaling == "none" else "the checkpoint is damaged"
        raise PlanError(f"{tensor.source_key}: {error}", where=tensor.file, hint=hint) from error


def _move_buffers_(module: nn.Module, device: torch.device) -> None:
    """Bring buffers that the module computed itself (rotary frequencies) to the device, in their own number format."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)
