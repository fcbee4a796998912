"""The VRAM plan: frozen data that says where every weight rests and in which form it is computed with.

Training and inference carry out the same plan with the same runtime; `purpose` is a field, not a second mechanism.
"""

from __future__ import annotations

from math import ceil, prod
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from framework.inventory import ELEMENT_BITS, Excerpt, Order
from framework.plan.preset_plan import PresetPlan

Purpose = Literal["train", "infer"]
Phase = Literal["load", "encode", "train", "sample", "save"]
Place = Literal["device", "host", "disk"]
StorageDtype = Literal["fp8_e4m3", "bf16", "fp16", "fp32"]
TensorKind = Literal["linear", "conv", "embedding", "other"]
Scaling = Literal["row", "tensor", "block", "none"]
Offload = Literal["none", "host", "disk"]
Granularity = Literal["model", "block", "layer"]

BLOCK_SHAPE = (128, 128)
"""Rows and columns that share a scale with `scaling: block`, as in DeepSeek-V3 (arXiv:2412.19437)."""
SAFETENSORS_NAMES: dict[StorageDtype, str] = {
    "fp8_e4m3": "F8_E4M3",
    "bf16": "BF16",
    "fp16": "F16",
    "fp32": "F32",
}
"""What safetensors files call the formats in which weights rest."""
BYTES_PER_ELEMENT: dict[StorageDtype, int] = {"fp8_e4m3": 1, "bf16": 2, "fp16": 2, "fp32": 4}


class Frozen(BaseModel):
    """Base of the plan's parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(Frozen):
    """A number format and where the bytes lie."""

    storage_dtype: StorageDtype
    place: Place


class States(Frozen):
    """The four states a weight can be in, from rest to use.

    offload: at rest while its component isn't used.   onload: at rest while its component is used.
    preparing: fetched ahead of use.   computation: what the arithmetic reads.
    """

    offload: Placement
    onload: Placement
    preparing: Placement
    computation: Placement


class StoredScale(Frozen):
    """The scale that a published FP8 file holds beside a weight's codes.

    key, file, shape, source_dtype, excerpt: as in `TensorPlan`.
    """

    key: str
    file: str
    shape: tuple[int, ...]
    source_dtype: str
    excerpt: Excerpt | None = None

    def cut(self, shape: tuple[int, ...], *, first_row: int, order: Order) -> StoredScale:
        """The rows that belong to part of the weight; arguments as of `StoredTensor.cut`."""
        excerpt = Excerpt(self.shape, first_row, order)
        return self.model_copy(update={"shape": shape, "excerpt": excerpt})


class TensorPlan(Frozen):
    """One tensor of a component.

    name: name in the module, e.g. "transformer_blocks.0.attn.to_q.weight".   source_key: its key in the file.
    file: path of the file; its bare name where the component's weights haven't been fetched yet.
    shape: elements.   source_dtype: safetensors name, e.g. "BF16".
    published_scale: the dequantisation scale of a weight that is FP8 in the file; weight = codes * scale.
    excerpt: which part of the file's tensor it is; None for a whole one as it is.
    """

    name: str
    source_key: str
    file: str
    shape: tuple[int, ...]
    source_dtype: str
    kind: TensorKind
    published_scale: StoredScale | None = None
    excerpt: Excerpt | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes in the file."""
        return self.numel * ELEMENT_BITS[self.source_dtype] // 8

    @property
    def layer(self) -> str:
        """Name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]


class TensorGroup(Frozen):
    """Tensors of a component that are stored alike.

    scaling: None unless the group is FP8; says which float32 scales lie beside the codes.
    block_shape: rows and columns that share a scale, with `scaling: block`; None otherwise.
    trains: True where gradients update these tensors themselves (`trainable: full`).
    """

    name: str
    states: States
    scaling: Scaling | None = None
    block_shape: tuple[int, int] | None = None
    trains: bool = False
    tensors: tuple[TensorPlan, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel for tensor in self.tensors)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def resting_bytes(self) -> int:
        """Bytes of all tensors at rest, scales included."""
        per_element = BYTES_PER_ELEMENT[self.states.onload.storage_dtype]
        return self.numel * per_element + sum(
            scale_bytes(tensor.shape, self.scaling, self.block_shape) for tensor in self.tensors
        )

    @property
    def moves(self) -> bool:
        """Whether the tensors rest elsewhere than on the device and are fetched for use."""
        return self.states.offload.place != "device"


class LoraLayer(Frozen):
    """One layer that gets an adapter. shape: of the base weight, output dimension first."""

    name: str
    kind: TensorKind
    shape: tuple[int, ...]


class LoraPlan(Frozen):
    """The adapter of a component, with `target_modules` already resolved to layer names. Adapters are float32."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    init_from: str | None
    layers: tuple[LoraLayer, ...]
    preset: PresetPlan | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def numel(self) -> int:
        """Number of parameters of the adapter that trains."""
        return sum(prod(shape) for shape in self.parameter_shapes())

    def parameter_shapes(self) -> list[tuple[int, ...]]:
        """Shapes as peft makes them: A (rank, inputs...), B (outputs, rank...), and DoRA's magnitude (outputs)."""
        shapes: list[tuple[int, ...]] = []
        for layer in self.layers:
            outputs, *inputs = layer.shape
            kernel = (1,) * (len(layer.shape) - 2)
            shapes += [(self.rank, *inputs), (outputs, self.rank, *kernel)]
            if self.use_dora:
                shapes.append((1, outputs, *kernel) if kernel else (outputs,))
        return shapes


class ComponentPlan(Frozen):
    """One component: its files, how it rests, what of it trains.

    folder: absolute path of the component's folder (config.json and weights); `hf://<repository>@<commit>/<subfolder>`
    where its weights haven't been fetched (`framework.hub.fetch_place` turns it into a folder).
    commit: the hub commit that `revision` stood for; None for a local folder.
    offload, granularity: where its large frozen weights rest, and how many of them are fetched together.
    converted_dir: folder for files with its weights in the form in which they rest; None where none are kept.
    optimizer_bytes: state of the optimizer (`framework.plan.optimizer_state`).
    """

    name: str
    source: str
    folder: str
    commit: str | None
    trainable: Literal["none", "lora", "full"]
    groups: tuple[TensorGroup, ...]
    lora: LoraPlan | None
    offload: Offload = "none"
    granularity: Granularity = "layer"
    converted_dir: str | None = None
    gradient_checkpointing: bool = False
    optimizer_bytes: int = 0
    ema: bool = False

    @computed_field  # type: ignore[prop-decorator]
    @property
    def numel(self) -> int:
        """Parameters of the published component, adapters not counted."""
        return sum(group.numel for group in self.groups)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def resting_bytes(self) -> int:
        """Bytes of the component's own weights once it is loaded."""
        return sum(group.resting_bytes for group in self.groups)

    def source_files(self, folder: Path) -> tuple[Path, ...]:
        """The files with its weights, sorted.   folder: of the component on this machine."""
        return tuple(folder / f for f in sorted({t.file for g in self.groups for t in g.tensors}))

    @property
    def weights_place(self) -> str:
        """Where its weights lie, for messages: the folder, or the single file whose config lies elsewhere."""
        first, *more = self.source_files(Path(self.folder))
        is_apart = not more and first.is_absolute() and first.parent != Path(self.folder)
        return f"{first} with {self.folder}/config.json" if is_apart else self.folder

    @property
    def source_bytes(self) -> int:
        """Bytes of its tensors in the files."""
        return sum(tensor.source_bytes for group in self.groups for tensor in group.tensors)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def trained_numel(self) -> int:
        """Parameters that gradients update."""
        adapter = self.lora.numel if self.lora and self.trainable == "lora" else 0
        return adapter + sum(group.numel for group in self.groups if group.trains)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def adapter_bytes(self) -> int:
        """Bytes of the float32 adapter weights, those of a preset included."""
        if self.lora is None:
            return 0
        return 4 * (self.lora.numel + (self.lora.preset.numel if self.lora.preset else 0))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gradient_bytes(self) -> int:
        """Bytes of the float32 gradients."""
        return 4 * self.trained_numel

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ema_bytes(self) -> int:
        """Bytes of the moving average of trained weights (float32)."""
        return 4 * self.trained_numel if self.ema else 0


class MemoryParts(Frozen):
    """What a phase holds in one memory at its highest, by what it is for; bytes.

    weights: of the components themselves, where they rest there.   adapters, gradients, optimizer, average: of what
    trains.   fetched: copies of weights that rest elsewhere, in use, on their way or kept.   staging: what loading and
    saving hold on the way.   activations: everything else that exists only while the phase computes, saved for the
    backward pass or not; None where it hasn't been traced.
    With a trace, gradients and fetched are what is there at the moment of the highest sum, so that parts add up to it.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    fetched: int = 0
    staging: int = 0
    activations: int | None = None

    @property
    def total_bytes(self) -> int:
        """Sum of the parts; activations that haven't been traced count as nothing."""
        return sum(count for count in self.by_name().values() if count is not None)

    def by_name(self) -> dict[str, int | None]:
        """Part -> bytes, in the order in which tables and charts show them."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class PhasePlan(Frozen):
    """What one phase of a run holds at its highest.

    components: names of those that are in memory; for `load` and `save`, of the phase in which that costs most.
    device: memory of `VramPlan.device`.   host: memory of the machine, beside it; where the device is the CPU both are
    the same memory, and what a phase takes of it is their sum.
    kept_bytes: of fetched units that stay on the device while there is room below `model.vram_limit`.
    """

    name: Phase
    components: tuple[str, ...]
    device: MemoryParts
    host: MemoryParts
    kept_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """Most bytes on the device at once; activations only where they were traced."""
        return self.device.total_bytes

    @property
    def host_bytes(self) -> int:
        """Most bytes in host memory at once."""
        return self.host.total_bytes

    @property
    def traced(self) -> bool:
        """Whether activations are counted."""
        return self.device.activations is not None


class TracedWith(Frozen):
    """What activations were traced with: they depend on more than the plan says.

    batch_size: pictures in a micro-step.   size_px: width and height of the largest of them; None in a generation.
    sample_size_px: of the pictures that are made; None where none are.   text_tokens: length of the longest caption.
    """

    batch_size: int
    size_px: tuple[int, int] | None
    sample_size_px: tuple[int, int] | None
    text_tokens: int


class VramPlan(Frozen):
    """The whole plan of a run or of a generation.

    traced_with: None where activations aren't counted.
    """

    purpose: Purpose
    family: str
    compute_dtype: Literal["bf16", "fp32", "fp16"]
    device: str
    vram_limit_bytes: int | None = None
    components: tuple[ComponentPlan, ...]
    phases: tuple[PhasePlan, ...]
    traced_with: TracedWith | None = None

    def component(self, name: str) -> ComponentPlan:
        """Return the component called `name`; KeyError if the plan has none."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    def has(self, name: str) -> bool:
        """Whether the plan loads a component called `name`."""
        return any(c.name == name for c in self.components)

    def phase(self, name: Phase) -> PhasePlan:
        """Return a phase by name; KeyError if the plan has none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)


def scale_bytes(
    shape: tuple[int, ...], scaling: Scaling | None, block_shape: tuple[int, int] | None = None
) -> int:
    """Bytes of the float32 dequantisation scales beside codes of this shape (output dimension first)."""
    return 4 * prod(scale_shape(shape, scaling, block_shape) or (0,))


def scale_shape(
    shape: tuple[int, ...], scaling: Scaling | None, block_shape: tuple[int, int] | None = None
) -> tuple[int, ...] | None:
    """Shape of the dequantisation scale beside codes of this shape; None where there is none.

    Codes are taken as a matrix (outputs, everything else): (outputs,) for rows, (1,) for a tensor, and for blocks
    (row blocks, column blocks), the last of each maybe smaller than the rest.
    """
    if scaling is None or scaling == "none":
        return None
    if scaling == "block":
        rows, columns = block_shape or BLOCK_SHAPE
        return ceil(shape[0] / rows), ceil(prod(shape[1:]) / columns)
    return (shape[0],) if scaling == "row" else (1,)
