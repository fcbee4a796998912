"""From one component's settings and headers to its part of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from framework.errors import Fault, SourceError
from framework.hub import ComponentHeaders
from framework.plan.match import matches_any, module_name, select_layers, tensor_kind
from framework.plan.native_names import read_component
from framework.plan.optimizer_state import optimizer_state_bytes
from framework.plan.preset import read_preset
from framework.plan.preset_plan import PresetPlan
from framework.plan.published import published_scaling
from framework.plan.types import (
    BLOCK_SHAPE,
    ComponentPlan,
    Granularity,
    LoraLayer,
    LoraPlan,
    Place,
    Placement,
    Purpose,
    Scaling,
    States,
    StorageDtype,
    TensorGroup,
    TensorPlan,
)
from framework.schema.families import ComponentSpec
from framework.schema.model import ComponentConfig, ComputeDtype, DitConfig, LoraConfig
from framework.schema.run import OptimConfig

CONVERTED_DIR = ".octavo/weights"
"""Where converted weights lie if nothing else is said."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass
class ComponentBuilder:
    """Builds one `ComponentPlan` and gathers everything that is wrong with it on the way.

    name: "dit", "text_encoder" or "vae".   converted_dir: as configured.
    faults: what was found wrong, in the configuration's words.
    """

    name: str
    config: ComponentConfig
    spec: ComponentSpec
    headers: ComponentHeaders
    compute_dtype: ComputeDtype
    purpose: Purpose
    converted_dir: str | None = None
    faults: list[Fault] = field(default_factory=list)

    def build(self, source: str, optim: OptimConfig | None) -> ComponentPlan:
        """Return the plan; it is of use only if `faults` is empty afterwards."""
        tensors = self._tensors()
        trains = self.config.trainable if self.purpose == "train" else "none"
        groups = self._trained(tensors) if trains == "full" else self._placed(self._frozen(tensors))
        lora = self._lora(tensors)
        plan = ComponentPlan(
            name=self.name,
            source=source,
            folder=self.headers.place,
            commit=self.headers.commit,
            trainable=trains,
            groups=groups,
            lora=lora,
            offload="none" if trains == "full" else self.config.offload,
            granularity=self.config.granularity,
            converted_dir=None if trains == "full" else self._converted_dir(),
            gradient_checkpointing=self.purpose == "train" and _has_checkpointing(self.config),
            ema=optim is not None and optim.ema is not None and trains != "none",
        )
        if optim is None or trains == "none":
            return plan
        shapes = lora.parameter_shapes() if lora else [tensor.shape for tensor in tensors]
        return plan.model_copy(
            update={"optimizer_bytes": optimizer_state_bytes(optim.name, shapes)}
        )

    def _tensors(self) -> list[TensorPlan]:
        """Every tensor that the family loads, in the order in which it lies in the files."""
        planned: dict[str, TensorPlan] = {}
        published = read_component(self.headers.tensors, self.spec)
        for problem in published.problems:
            self._fault(
                "source",
                f"the checkpoint of {self.name} can't be used: {problem}",
                hint="Give one whose weights are bf16, or float8_e4m3 with a scale per tensor, row or block.",
            )
        for key, stored in sorted(
            published.tensors.items(), key=lambda item: (item[1].file, item[1].start)
        ):
            name = module_name(key, self.spec)
            if name is None:
                continue
            if name in planned or stored.dtype not in _FLOATS:
                reason = (
                    f"two tensors become {name}"
                    if name in planned
                    else f"{stored.key} has dtype {stored.dtype}"
                )
                self._fault(
                    "source",
                    f"the checkpoint of {self.name} can't be used: {reason}",
                    hint="Give another checkpoint, or fetch this one again.",
                )
                continue
            planned[name] = TensorPlan(
                name=name,
                source_key=stored.key,
                file=stored.file,
                shape=stored.shape,
                source_dtype=stored.dtype,
                kind=tensor_kind(name, stored.shape, self.spec),
                published_scale=published.scales.get(key),
                excerpt=stored.excerpt,
            )
        return list(planned.values())

    def _trained(self, tensors: list[TensorPlan]) -> tuple[TensorGroup, ...]:
        return (_group("trained", tensors, at_rest="fp32", computation="fp32", trains=True),)

    def _frozen(self, tensors: list[TensorPlan]) -> tuple[TensorGroup, ...]:
        """Split into what rests in FP8 and the rest.

        Weights that are FP8 in the file and shall be FP8 are kept as they are: encoding them again would add error.
        """
        encoded = self._fp8_names(tensors) if self.config.precision == "fp8" else set()
        kinds: dict[tuple[str, Scaling, tuple[int, int] | None], list[TensorPlan]] = {}
        for tensor in tensors:
            if tensor.name in encoded:
                kinds.setdefault(self._storage(tensor), []).append(tensor)
        groups = [
            _group(
                name,
                members,
                at_rest="fp8_e4m3",
                computation=self.compute_dtype,
                scaling=scaling,
                block_shape=block_shape,
            )
            for (name, scaling, block_shape), members in sorted(
                kinds.items(), key=lambda k: k[0][0]
            )
        ]
        rest = [t for t in tensors if t.name not in encoded]
        groups.append(
            _group(
                "high_precision", rest, at_rest=self.compute_dtype, computation=self.compute_dtype
            )
        )
        return tuple(groups)

    def _storage(self, tensor: TensorPlan) -> tuple[str, Scaling, tuple[int, int] | None]:
        """Group, scaling and block shape of a weight that shall rest in FP8."""
        if tensor.source_dtype != "F8_E4M3":
            scaling = self.config.fp8.scaling
            return "fp8", scaling, BLOCK_SHAPE if scaling == "block" else None
        if tensor.published_scale is None:
            return "fp8_as_published", "none", None
        fitting = published_scaling(tensor.shape, tensor.published_scale.shape)
        assert fitting is not None  # `read_published` refuses any other
        scaling, block_shape = fitting
        size = "_{}x{}".format(*block_shape) if block_shape else ""
        return f"fp8_as_published_{scaling}{size}", scaling, block_shape

    def _converted_dir(self) -> str | None:
        """Weights that rest on disk are read as they are, so a file must hold them in that form."""
        return self.converted_dir or (CONVERTED_DIR if self.config.offload == "disk" else None)

    def _placed(self, groups: tuple[TensorGroup, ...]) -> tuple[TensorGroup, ...]:
        """Let large weights rest where `offload` says; norms, biases and the like are small and stay on the device."""
        place = self.config.offload
        if place == "none":
            return groups
        placed = []
        for group in groups:
            large = tuple(t for t in group.tensors if t.kind != "other")
            small = tuple(t for t in group.tensors if t.kind == "other")
            if large:
                states = _moving(group.states, place, self.config.granularity)
                placed.append(group.model_copy(update={"states": states, "tensors": large}))
            if small:
                name = "small" if large else group.name
                placed.append(group.model_copy(update={"name": name, "tensors": small}))
        return tuple(placed)

    def _fp8_names(self, tensors: list[TensorPlan]) -> set[str]:
        """Names of the weights that rest in FP8."""
        fp8 = self.config.fp8
        layers = {t.layer: t for t in tensors if t.layer}
        keep = fp8.keep_high_precision
        if keep is not None:
            path = f"model.{self.name}.fp8.keep_high_precision"
            _, faults = select_layers(keep, layers, path=path, what="layers", component=self.name)
            self.faults += faults
        globs = self.spec.keep_high_precision if keep is None else keep
        names = {
            t.name for t in tensors if t.kind in fp8.layers and not matches_any(t.layer, globs)
        }
        if not names:
            kinds = sorted({t.kind for t in tensors if t.kind != "other"})
            self._fault(
                "precision",
                f"fp8 would store no layer of {self.name} in FP8: it has layers of kind {', '.join(kinds) or 'none'}, "
                f"and fp8.layers is [{','.join(fp8.layers)}]",
                hint=f"Set model.{self.name}.fp8.layers=[{','.join(kinds)}], or model.{self.name}.precision=bf16.",
                code="layer-name",
            )
        return names

    def _lora(self, tensors: list[TensorPlan]) -> LoraPlan | None:
        """The adapter that trains, or, for inference, the one that `init_from` names."""
        config = self.config.lora or LoraConfig()
        if self.config.trainable != "lora" or (
            self.purpose == "infer" and config.init_from is None
        ):
            return None
        if config.init_from is not None and not Path(config.init_from).expanduser().is_file():
            message = f'the file "{config.init_from}" does not exist'
            self._fault("lora.init_from", message, hint="Correct it, or set it to null.")
        candidates = {t.layer: t for t in tensors if t.kind in ("linear", "conv")}
        only_linear = all(t.kind == "linear" for t in candidates.values())
        globs = self.spec.lora_targets if config.target_modules is None else config.target_modules
        chosen, faults = select_layers(
            globs,
            candidates,
            path=f"model.{self.name}.lora.target_modules",
            what="linear layers" if only_linear else "linear and convolution layers",
            component=self.name,
        )
        if config.target_modules is None and chosen:
            faults = []
        self.faults += faults
        self._refuse_convolutions_3d(chosen, candidates)
        layers = [
            LoraLayer(name=name, kind=tensor.kind, shape=tensor.shape)
            for name, tensor in candidates.items()
            if name in chosen
        ]
        return LoraPlan(
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_from=config.init_from,
            layers=tuple(layers),
            preset=self._preset(config, candidates),
        )

    def _preset(self, config: LoraConfig, layers: Mapping[str, TensorPlan]) -> PresetPlan | None:
        """The frozen adapter under the one that trains; generating does without it."""
        if config.preset is None or self.purpose == "infer":
            return None
        try:
            shapes = {name: tensor.shape for name, tensor in layers.items()}
            return read_preset(Path(config.preset).expanduser(), self.name, self.spec, shapes)
        except SourceError as error:
            message = f"{error.message} ({'; '.join(t for t in (error.where, error.found) if t)})"
            self._fault("lora.preset", message, hint=f"{error.hint}, or set it to null.")
            return None

    def _refuse_convolutions_3d(self, chosen: set[str], candidates: dict[str, TensorPlan]) -> None:
        """A causal 3-D convolution pads its own input, and peft makes no adapter for such a class."""
        wide = sorted(name for name in chosen if len(candidates[name].shape) == 5)
        if wide:
            self._fault(
                "lora.target_modules",
                f"{len(wide)} chosen layers are 3-D convolutions, which can't take an adapter: {', '.join(wide[:3])}",
                hint="Choose attention layers (to_qkv, proj) or other 2-D convolutions.",
                code="layer-name",
            )

    def _fault(self, key: str, message: str, *, hint: str, code: str = "file") -> None:
        path = f"model.{self.name}.{key}"
        self.faults.append(Fault(path=path, message=message, hint=hint, code=code))


def _has_checkpointing(config: ComponentConfig) -> bool:
    """Whether the component is asked to recompute its blocks in the backward pass."""
    return isinstance(config, DitConfig) and config.gradient_checkpointing


def _moving(states: States, place: Place, granularity: Granularity) -> States:
    """States of weights that rest elsewhere.

    All of a component is brought to the device when it is used; blocks and layers stay where they rest until then.
    """
    rest = Placement(storage_dtype=states.offload.storage_dtype, place=place)
    return states.model_copy(
        update={"offload": rest, "onload": states.onload if granularity == "model" else rest}
    )


def _group(
    name: str,
    tensors: list[TensorPlan],
    *,
    at_rest: StorageDtype,
    computation: StorageDtype,
    scaling: Scaling | None = None,
    block_shape: tuple[int, int] | None = None,
    trains: bool = False,
) -> TensorGroup:
    rest = Placement(storage_dtype=at_rest, place="device")
    states = States(
        offload=rest,
        onload=rest,
        preparing=rest,
        computation=Placement(storage_dtype=computation, place="device"),
    )
    return TensorGroup(
        name=name,
        states=states,
        scaling=scaling,
        block_shape=block_shape,
        trains=trains,
        tensors=tuple(tensors),
    )
