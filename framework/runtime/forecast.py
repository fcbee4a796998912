"""Predicts the peak of every phase, activations included, before a weight is read.

`forecast_run` and `forecast_inference` return the plan that `framework.plan.build` makes, with the parts of the phases
encode, train and sample as a rehearsal on fake tensors found them (`framework.runtime.rehearsal`). Nothing is
allocated: a 20B model is planned in seconds on any machine.

Where this build of torch has no such device, the CPU stands in for it: the same operators run and the same tensors come
and go, but for what a kernel of the device itself would return differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from framework.data import make_buckets, read_samples
from framework.diffusion.flow_matching import flow_loss, interpolate, loss_weight, velocity_target
from framework.errors import DataError
from framework.models import Family, TextConditioning, get_family
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.optimizer_state import optimizer_state_bytes, optimizer_step_bytes
from framework.plan.phases import TracedPhase, with_traced
from framework.plan.types import ComponentPlan, MemoryParts, Phase, PhasePlan, TracedWith, VramPlan
from framework.plan.units import bytes_at, component_units
from framework.runtime.devices import COMPUTE_DTYPES
from framework.runtime.rehearsal import FETCHED, GRADIENTS, Bytes, Rehearsal, Stage, Stages
from framework.runtime.trace import ACTIVATIONS
from framework.schema.model import ModelConfig
from framework.schema.run import RunConfig
from framework.storage.stores import STAGING_BYTES

OPTIMIZER, AVERAGE = "optimizer", "average"
TEXT_TOKENS = 256
"""Length of a caption where the data can't be asked; a guess: two or three sentences of 40 words."""
# Of the captions with most characters, so many are tokenised to find the longest one.
_NUM_LONG_CAPTIONS = 32
# The same plan is asked for again when a run that has just been planned is started.
_NUM_REMEMBERED = 8
_traced_before: dict[tuple[str, int, str], VramPlan] = {}


def forecast_run(
    config: RunConfig,
    *,
    device: str,
    text_tokens: int | None = None,
    family: Family | None = None,
) -> VramPlan:
    """The plan of a training run with traced activations.

    device: "cpu", "cuda:0", ... as a label; it needn't be there.   text_tokens: length of the longest caption; None
    asks the data, and takes 256 where that can't be done (no data yet, or a tokenizer that isn't on this disk).
    family: with its tokenizer loaded; None makes one.
    The largest bucket of `data.max_px` is what a step is traced with. Raises as `build_run_plan`.
    """
    plan = build_run_plan(config, device=device)
    return traced_run(plan, config, text_tokens=text_tokens, family=family)


def traced_run(
    plan: VramPlan,
    config: RunConfig,
    *,
    text_tokens: int | None = None,
    family: Family | None = None,
) -> VramPlan:
    """A run's plan with the activations that it will have; see `forecast_run`."""
    family = family or get_family(config.model.family)
    if text_tokens is None:
        text_tokens = longest_caption(config, family)
    tracer = _Tracer(family, plan, text_tokens)
    size_px = largest_size(config, family)
    known = (plan.model_dump_json(), tracer.text_tokens, _deciding(config))
    if known in _traced_before:
        return _traced_before[known]
    traced: dict[Phase, TracedPhase] = {}
    for phase in plan.phases:
        if phase.name == "encode":
            traced["encode"] = tracer.encode(phase, size_px)
        elif phase.name == "train":
            traced["train"] = _RunTracer(tracer, config).train(phase)
        elif phase.name == "sample":
            guided = config.sample.guidance_scale > 1
            traced["sample"] = tracer.sample(phase, config.sample.size_px, guided=guided)
    used = TracedWith(
        batch_size=config.data.batch_size,
        size_px=size_px,
        sample_size_px=config.sample.size_px if "sample" in traced else None,
        text_tokens=tracer.text_tokens,
    )
    while len(_traced_before) >= _NUM_REMEMBERED:
        del _traced_before[next(iter(_traced_before))]
    _traced_before[known] = with_traced(plan, traced, used)
    return _traced_before[known]


def _deciding(config: RunConfig) -> str:
    """What activations depend on beside the plan."""
    return config.model_dump_json(
        include={
            "data": {"batch_size", "max_px", "max_aspect_ratio"},
            "objective": {"weighting", "loss", "huber_delta"},
            "optim": {"name", "ema"},
            "trainer": {"accumulate_grad_batches"},
            "sample": {"size_px", "guidance_scale"},
        }
    )


def forecast_inference(
    model: ModelConfig,
    *,
    size_px: tuple[int, int],
    device: str,
    num_tokens: int = TEXT_TOKENS,
    guided: bool = True,
) -> VramPlan:
    """The plan of a generation with traced activations; pictures are made one by one, so their number doesn't matter.

    size_px: width and height.   num_tokens: length of the longest prompt.   guided: classifier-free guidance.
    """
    plan = build_inference_plan(model, device=device)
    return traced_inference(
        plan, get_family(model.family), size_px=size_px, num_tokens=num_tokens, guided=guided
    )


def traced_inference(
    plan: VramPlan, family: Family, *, size_px: tuple[int, int], num_tokens: int, guided: bool
) -> VramPlan:
    """A generation's plan with the activations that it will have; see `forecast_inference`."""
    tracer = _Tracer(family, plan, num_tokens)
    traced: dict[Phase, TracedPhase] = {
        "encode": tracer.encode(plan.phase("encode"), None),
        "sample": tracer.sample(plan.phase("sample"), size_px, guided=guided),
    }
    used = TracedWith(
        batch_size=1, size_px=None, sample_size_px=size_px, text_tokens=tracer.text_tokens
    )
    return with_traced(plan, traced, used)


def largest_size(config: RunConfig, family: Family) -> tuple[int, int]:
    """Width and height of the bucket with most pixels."""
    buckets = make_buckets(
        config.data.max_px,
        divisor_px=family.spec.size_divisor_px,
        max_aspect_ratio=config.data.max_aspect_ratio,
    )
    return max(buckets, key=lambda size: size[0] * size[1])


def longest_caption(config: RunConfig, family: Family) -> int:
    """Tokens of the longest caption or prompt; `TEXT_TOKENS` where data or tokenizer aren't on this disk."""
    source = Path(config.model.source).expanduser()
    if not (source / "tokenizer").is_dir():
        return TEXT_TOKENS
    try:
        captions = {sample.caption for sample in read_samples(config.data)}
    except DataError:
        return TEXT_TOKENS
    family.load_extras(source / "tokenizer", source / "scheduler")
    longest = sorted(captions, key=len)[-_NUM_LONG_CAPTIONS:]
    return family.count_text_tokens([*longest, *config.sample.prompts])


class _Tracer:
    """Traces what both training and generation do."""

    def __init__(self, family: Family, plan: VramPlan, text_tokens: int) -> None:
        self.family = family
        self.plan = plan
        self.text_tokens = max(1, text_tokens)
        self.device = _stand_in(plan.device)
        self.compute_dtype = COMPUTE_DTYPES[plan.compute_dtype]

    def rehearsal(self, phase: PhasePlan) -> Rehearsal:
        """The phase's components without content; the DiT is shortened."""
        rehearsal = Rehearsal(self.family, self.device, self.compute_dtype)
        for name in phase.components:
            rehearsal.build(self.plan.component(name), shorten=name == "dit")
        return rehearsal

    def held(self, phase: PhasePlan) -> list[ComponentPlan]:
        """Plans of the phase's components."""
        return [self.plan.component(name) for name in phase.components]

    def encode(self, phase: PhasePlan, size_px: tuple[int, int] | None) -> TracedPhase:
        """One picture and one caption, one after the other."""
        rehearsal = self.rehearsal(phase)
        modules = rehearsal.modules

        def step(stages: Stages) -> None:
            with torch.no_grad():
                if "vae" in modules and size_px is not None:
                    width, height = size_px
                    self.family.encode_image(torch.empty(1, 3, height, width), modules["vae"])
                    stages.end("picture")
                if "text_encoder" in modules:
                    self.family.rehearse_text(self.text_tokens, modules["text_encoder"])
                    stages.end("caption")

        return self.traced(phase, rehearsal.run(step, gradients=False), {})

    def sample(self, phase: PhasePlan, size_px: tuple[int, int], *, guided: bool) -> TracedPhase:
        """One denoising step of one picture, guided or not, and its decoding."""
        rehearsal = self.rehearsal(phase)
        dit, vae = rehearsal.modules["dit"], rehearsal.modules["vae"]
        shape = self.latent_shape(size_px)
        # Sampling amid training runs under the run's autocast, generation in the weights' own format.
        precision = rehearsal.autocast if self.plan.purpose == "train" else nullcontext

        def step(stages: Stages) -> None:
            latents = torch.empty(1, *shape, device=self.device)
            sigma = torch.empty(1, device=self.device)
            prompts = [self.text(dit, 1, torch.float32) for _ in range(2 if guided else 1)]
            with torch.no_grad(), precision():
                found = [self.family.predict(latents, sigma, text, dit) for text in prompts]
                stages.end("denoising")
                del found
                self.family.decode_image(latents, vae)
                stages.end("decoding")

        held = self.held(phase)
        average = sum(part.ema_bytes for part in held)
        constant = {
            OPTIMIZER: sum(part.optimizer_bytes for part in held),
            # While the average stands in their place, the weights that train are kept beside it.
            AVERAGE: 2 * average,
        }
        return self.traced(phase, rehearsal.run(step, gradients=False), constant)

    def text(self, dit: nn.Module, batch_size: int, dtype: torch.dtype) -> TextConditioning:
        """Encoded captions as they come from the cache."""
        width = self.family.text_width(dit)
        embeds = torch.empty(batch_size, self.text_tokens, width, dtype=dtype, device=self.device)
        mask = torch.ones(batch_size, self.text_tokens, dtype=torch.bool, device=self.device)
        return TextConditioning(embeds, mask, padded=batch_size > 1)

    def latent_shape(self, size_px: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) of a picture's latents."""
        return tuple(self.family.initial_latents(*size_px, 0).shape[1:])

    def traced(self, phase: PhasePlan, stages: dict[str, Stage], constant: Bytes) -> TracedPhase:
        """The parts of the highest stage.   constant: optimizer and average, which are there all through the phase."""
        held = self.held(phase)
        device = max((_beside_fetched(stage.device) for stage in stages.values()), key=_total)
        host = max((stage.host for stage in stages.values()), key=_total)
        parts = {name: device.get(name, 0) for name in (GRADIENTS, OPTIMIZER, AVERAGE, ACTIVATIONS)}
        on_device = MemoryParts(
            weights=sum(bytes_at(part, "device") for part in held),
            adapters=sum(part.adapter_bytes for part in held),
            **(parts | constant),
        )
        apart = self.plan.device.partition(":")[0] != "cpu"
        beside = _total(host) if apart and self.device.type != "cpu" else 0
        staging = max((_staging_bytes(part) for part in held), default=0) if apart else 0
        return TracedPhase(
            on_device,
            MemoryParts(weights=phase.host.weights, staging=staging, activations=beside),
        )


class _RunTracer:
    """Traces an optimizer step in the steady state: state, average and the gradients of the step before are there."""

    def __init__(self, tracer: _Tracer, config: RunConfig) -> None:
        self._tracer = tracer
        self._config = config
        self._family = tracer.family
        self._trained = {c.name for c in tracer.plan.components if c.trained_numel}
        self._shape: tuple[int, ...] = ()

    def train(self, phase: PhasePlan) -> TracedPhase:
        """Forward, backward and update of one micro-step with the largest pictures and the longest captions."""
        rehearsal = self._tracer.rehearsal(phase)
        for name in self._trained:
            rehearsal.modules[name].train()
            if self._tracer.plan.component(name).gradient_checkpointing:
                rehearsal.modules[name].enable_gradient_checkpointing()  # type: ignore[operator]
        self._size_px = largest_size(self._config, self._family)
        self._shape = self._tracer.latent_shape(self._size_px)
        stages = rehearsal.run(lambda found: self._step(rehearsal, found), gradients=True)
        return self._tracer.traced(phase, stages, {})

    def _step(self, rehearsal: Rehearsal, stages: Stages) -> None:
        trained = [p for m in rehearsal.modules.values() for p in m.parameters() if p.requires_grad]
        batch = self._batch(rehearsal)
        with rehearsal.autocast():
            loss = self._loss(batch, rehearsal)
        stages.end("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        stages.end("backward to block 0")
        self._count_update(trained, stages)

    def _count_update(self, trained: Sequence[Tensor], stages: Stages) -> None:
        """Add what a step in the steady state holds beside what the first one did, and the update itself."""
        updated = [tuple(p.shape) for p in trained if p.grad is not None]
        gradients = 4 * sum(p.numel() for p in trained if p.grad is not None)
        optim = self._config.optim
        steady = {
            OPTIMIZER: optimizer_state_bytes(optim.name, updated),
            AVERAGE: 4 * sum(p.numel() for p in trained) if optim.ema is not None else 0,
        }
        at_once = not self._tracer.plan.device.startswith(("cpu", "mps"))
        stages.end("update")
        update = stages.found["update"].device
        update[ACTIVATIONS] = update.get(ACTIVATIONS, 0) + optimizer_step_bytes(
            optim.name, updated, at_once=at_once
        )
        accumulates = self._config.trainer.accumulate_grad_batches > 1
        for name, stage in stages.found.items():
            stage.device |= steady
            # The gradients of the step before are let go after the forward pass; while they are summed up, they stay.
            if name == "forward" or accumulates:
                stage.device[GRADIENTS] = gradients

    def _batch(self, rehearsal: Rehearsal) -> dict[str, Tensor]:
        """What the loader brings: pictures, or latents and encoded captions."""
        size = self._config.data.batch_size
        width, height = self._size_px
        device = self._tracer.device
        batch: dict[str, Tensor] = {}
        if "vae" in rehearsal.modules:
            batch["pixels"] = torch.empty(size, 3, height, width, device=device)
        else:
            batch["latents"] = torch.empty(size, *self._shape, device=device)
        return batch

    def _loss(self, batch: dict[str, Tensor], rehearsal: Rehearsal) -> Tensor:
        modules = rehearsal.modules
        losses = []
        if self._trained & {"dit", "text_encoder"}:
            losses.append(self._flow_loss(batch, modules))
        if "vae" in self._trained:
            losses.append(self._reconstruction_loss(batch["pixels"], modules["vae"]))
        return torch.stack(losses).sum()

    def _flow_loss(self, batch: dict[str, Tensor], modules: dict[str, nn.Module]) -> Tensor:
        size, device = self._config.data.batch_size, self._tracer.device
        if "latents" in batch:
            latents = batch["latents"].float()
        else:
            with torch.no_grad():
                latents = self._family.encode_image(batch["pixels"], modules["vae"])
        text = self._text(modules, size)
        noise = torch.empty(size, *self._shape, device=device)
        sigma = torch.empty(size, device=device)
        noisy = interpolate(latents, noise, sigma)
        prediction = self._family.predict(noisy, sigma, text, modules["dit"])
        objective = self._config.objective
        return flow_loss(
            prediction,
            velocity_target(latents, noise),
            loss_weight(sigma, objective.weighting),
            loss=objective.loss,
            huber_delta=objective.huber_delta,
        )

    def _text(self, modules: dict[str, nn.Module], size: int) -> TextConditioning:
        if "text_encoder" not in modules:
            dtype = self._tracer.compute_dtype
            return self._tracer.text(modules["dit"], size, dtype)
        with torch.set_grad_enabled("text_encoder" in self._trained):
            return self._family.rehearse_text(
                self._tracer.text_tokens, modules["text_encoder"], batch_size=size
            )

    def _reconstruction_loss(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        noise = torch.empty(len(pixels), *self._shape, device=pixels.device)
        reconstruction, mean, logvar = self._family.reconstruct(pixels, vae, noise=noise)
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        return (reconstruction - pixels).abs().mean() + divergence


def _stand_in(device: str) -> torch.device:
    """The device itself if this machine has it, else the CPU: torch can't differentiate on a device that it lacks."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.device(device)
    return torch.device("cpu")


def _staging_bytes(part: ComponentPlan) -> int:
    """The buffer through which files reach a GPU."""
    if part.offload != "disk":
        return 0
    sizes = [parcel.num_bytes for unit in component_units(part) for parcel in unit.parcels]
    return min(STAGING_BYTES, max(sizes, default=0))


def _beside_fetched(labels: Bytes) -> Bytes:
    return {label: count for label, count in labels.items() if label != FETCHED}


def _total(labels: Bytes) -> int:
    return sum(labels.values())
