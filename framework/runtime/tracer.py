"""Traces the phases of a plan on fake tensors: what a picture, a caption, a denoising and a training step hold.

Where this build of torch has no such device, the CPU stands in for it: the same operators run and the same tensors come
and go, but for what a kernel of the device itself would return differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from framework.data import make_buckets
from framework.diffusion.distillation import sample_differentiably
from framework.diffusion.flow_matching import flow_loss, interpolate, loss_weight, velocity_target
from framework.models import Family, TextConditioning
from framework.plan.build import trained_denoiser
from framework.plan.optimizer_state import optimizer_state_bytes, optimizer_step_bytes
from framework.plan.phases import TracedPhase
from framework.plan.types import ComponentPlan, MemoryParts, PhasePlan, VramPlan
from framework.plan.units import bytes_at, component_units
from framework.runtime.devices import COMPUTE_DTYPES
from framework.runtime.rehearsal import FETCHED, GRADIENTS, Bytes, Rehearsal, Stage, Stages
from framework.runtime.trace import ACTIVATIONS
from framework.schema.families import DENOISERS, FAMILIES
from framework.schema.run import RunConfig
from framework.storage.stores import STAGING_BYTES

OPTIMIZER, AVERAGE = "optimizer", "average"
Extent = tuple[int, int, int]
"""Width and height in px, and number of frames."""


def training_frames(config: RunConfig) -> int:
    """Frames of the longest training clip; 1 for pictures."""
    video = FAMILIES[config.model.family].media == "video"
    return config.data.num_frames if video else 1


def largest_size(config: RunConfig, family: Family) -> tuple[int, int]:
    """Width and height of the bucket with most pixels."""
    buckets = make_buckets(
        config.data.max_px,
        divisor_px=family.spec.size_divisor_px,
        max_aspect_ratio=config.data.max_aspect_ratio,
    )
    return max(buckets, key=lambda size: size[0] * size[1])


class Tracer:
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
            rehearsal.build(self.plan.component(name), shorten=name in DENOISERS)
        return rehearsal

    def held(self, phase: PhasePlan) -> list[ComponentPlan]:
        """Plans of the phase's components."""
        return [self.plan.component(name) for name in phase.components]

    def encode(self, phase: PhasePlan, extent: Extent | None) -> TracedPhase:
        """One picture or clip and one caption, one after the other."""
        rehearsal = self.rehearsal(phase)
        modules = rehearsal.modules

        def step(stages: Stages) -> None:
            with torch.no_grad():
                if "vae" in modules and extent is not None:
                    pixels = torch.empty(self.pixel_shape(extent, 1))
                    self.family.encode_image(pixels, modules["vae"])
                    stages.end("picture")
                encoders = self.encoders(modules)
                if encoders:
                    self.family.rehearse_text(self.text_tokens, encoders)
                    stages.end("caption")

        return self.traced(phase, rehearsal.run(step, gradients=False), {})

    def sample(self, phase: PhasePlan, extent: Extent, *, guided: bool) -> TracedPhase:
        """One denoising step of one picture or clip, guided or not, and its decoding."""
        rehearsal = self.rehearsal(phase)
        dit, vae = rehearsal.modules[self.family.spec.denoisers[0]], rehearsal.modules["vae"]
        shape = self.latent_shape(extent)
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
        text = self.family.blank_text(
            self.text_tokens, dit, batch_size=batch_size, device=self.device
        )
        return text.to(dtype=dtype)

    def encoders(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The text encoders, where all of them are held."""
        names = self.family.spec.text_encoders
        return {name: modules[name] for name in names} if set(names) <= set(modules) else {}

    def latent_shape(self, extent: Extent) -> tuple[int, ...]:
        """(C, h, w) of a picture's latents, (C, T, h, w) of a clip's."""
        width, height, frames = extent
        return tuple(self.family.initial_latents(width, height, 0, num_frames=frames).shape[1:])

    def pixel_shape(self, extent: Extent, batch_size: int) -> tuple[int, ...]:
        """(B, 3, H, W) of pictures, (B, 3, F, H, W) of clips."""
        width, height, frames = extent
        time = (frames,) if self.family.spec.media == "video" else ()
        return (batch_size, 3, *time, height, width)

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


class RunTracer:
    """Traces an optimizer step in the steady state: state, average and the gradients of the step before are there."""

    def __init__(self, tracer: Tracer, config: RunConfig) -> None:
        self._tracer = tracer
        self._config = config
        self._family = tracer.family
        self._trained = {c.name for c in tracer.plan.components if c.trained_numel}
        self._denoiser = trained_denoiser(config.model)
        self._shape: tuple[int, ...] = ()

    def train(self, phase: PhasePlan) -> TracedPhase:
        """Forward, backward and update of one micro-step with the largest pictures and the longest captions."""
        rehearsal = self._tracer.rehearsal(phase)
        for name in self._trained:
            rehearsal.modules[name].train()
            if self._tracer.plan.component(name).gradient_checkpointing:
                rehearsal.modules[name].enable_gradient_checkpointing()  # type: ignore[operator]
        width, height = largest_size(self._config, self._family)
        self._extent = (width, height, training_frames(self._config))
        self._shape = self._tracer.latent_shape(self._extent)
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
        device = self._tracer.device
        batch: dict[str, Tensor] = {}
        if "vae" in rehearsal.modules:
            batch["pixels"] = torch.empty(
                self._tracer.pixel_shape(self._extent, size), device=device
            )
        else:
            batch["latents"] = torch.empty(size, *self._shape, device=device)
        return batch

    def _loss(self, batch: dict[str, Tensor], rehearsal: Rehearsal) -> Tensor:
        modules = rehearsal.modules
        losses = []
        spec = self._family.spec
        if self._trained & {*spec.denoisers, *spec.text_encoders}:
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
        objective = self._config.objective
        dit = modules[self._denoiser]
        if objective.name == "direct_distill":
            # Only how many steps there are decides, not at which noise levels.
            levels = tuple(
                1 - step / objective.distill_steps for step in range(objective.distill_steps + 1)
            )
            made = sample_differentiably(
                lambda x, level: self._family.predict(x, level, text, dit), noise, levels
            )
            return flow_loss(made, latents, torch.ones_like(sigma), loss=objective.loss)
        prediction = self._family.predict(noisy, sigma, text, dit)
        return flow_loss(
            prediction,
            velocity_target(latents, noise),
            loss_weight(sigma, objective.weighting),
            loss=objective.loss,
            huber_delta=objective.huber_delta,
        )

    def _text(self, modules: dict[str, nn.Module], size: int) -> TextConditioning:
        dit = modules[self._denoiser]
        blank = self._tracer.text(dit, size, self._tracer.compute_dtype)
        encoders = self._tracer.encoders(modules)
        if not encoders:
            return blank
        with torch.set_grad_enabled(bool(self._trained & set(encoders))):
            text = self._family.rehearse_text(self._tracer.text_tokens, encoders, batch_size=size)
        return replace(text, controls=blank.controls, geometry=blank.geometry)

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
