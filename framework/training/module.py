"""The Lightning module: it holds what the plan loads for training, and computes losses with it.

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Self

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from framework.errors import RunError
from framework.models import Family, TextConditioning
from framework.plan.build import build_plan, trained_denoiser
from framework.plan.types import Phase, Purpose, VramPlan
from framework.runtime.devices import COMPUTE_DTYPES
from framework.runtime.residency import Residency, unwatched
from framework.schema import ModelConfig, OptimConfig, RunConfig
from framework.training.data_module import DiffusionDataModule
from framework.training.ema import TrainableEma
from framework.training.memory import PhasePeaks
from framework.training.metrics import StepClock
from framework.training.objective import Batch, Objective
from framework.training.optimizers import apply_settings_, build_optimizer, build_schedule
from framework.training.progress import show_loading
from framework.training.reproducibility import generator_states, restore_generator_states_
from framework.training.trained_state import check_trained_state, trained_parameters


class DiffusionTrainingModule(pl.LightningModule):
    """Trains whatever the plan says trains, on whatever precision the rest is stored in.

    Components are loaded by `configure_model`, after the data module has encoded what frozen encoders can
    encode once, so the encoders' memory is free again. Precision, placement and adapters are the plan's and
    the runtime's business; nothing here asks for them.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        plan: VramPlan,
        family: Family,
        clock: StepClock,
        goes_on: bool = False,
    ) -> None:
        """goes_on: the run's own checkpoint is loaded, which may be that of the last step."""
        super().__init__()
        self.config = config
        self.plan = plan
        self.family = family
        self.residency: Residency
        self.denoiser = trained_denoiser(config.model)
        self.objective = Objective(config.objective, family, config.trainer.seed, self.denoiser)
        self.components = nn.ModuleDict()
        self.ema: TrainableEma | None = None
        self.peaks = PhasePeaks()
        self.grad_norm = 0.0
        self.last_lr = config.optim.lr
        # The state dict of a checkpoint has trained weights only; `check_trained_state` is the strict check.
        self.strict_loading = False
        self._clock = clock
        self._goes_on = goes_on
        self._step_losses: list[dict[str, Tensor]] = []
        self._trained = {c.name for c in plan.components if c.trained_numel}

    @classmethod
    def parse_model_configs(
        cls,
        model_config: ModelConfig,
        *,
        phases: tuple[Phase, ...],
        resident: Mapping[Phase, tuple[str, ...]],
        device: str,
        purpose: Purpose = "train",
        optim: OptimConfig | None = None,
    ) -> VramPlan:
        """Turn a model's configuration into the plan that is carried out; reads headers only.

        This is `framework.plan.build.build_plan`, which plans generation too: what a component needs to run
        and what it needs to train are decided in one place.
        """
        return build_plan(
            model_config,
            purpose=purpose,
            phases=phases,
            resident=resident,
            device=device,
            optim=optim,
        )

    # ---- components ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Encode what frozen encoders can encode once, before anything else is loaded."""
        self.residency = Residency(
            self.plan,
            self.family,
            self.trainer.strategy.root_device,
            COMPUTE_DTYPES[self.config.model.compute_dtype],
            self.config.trainer.seed,
            watch=show_loading,
        )
        with self.peaks.phase("encode"):
            self._data.encode(self.residency)

    def configure_model(self) -> None:
        """Load the components of the phase `train`; called by Lightning on every process."""
        if self.components:
            return
        with self.peaks.phase("load"):
            self.enter_training()
        trained = self.trained_parameters()
        decay = self.config.optim.ema
        self.ema = TrainableEma(trained, decay.decay) if decay is not None else None
        # Frozen weights come from the same files on every process. Broadcasting them would cost time, and
        # collectives refuse FP8.
        state_names = {name for name, _ in self.named_parameters()}
        state_names |= {name for name, _ in self.named_buffers()}
        self._ddp_params_and_buffers_to_ignore = sorted(state_names - set(trained))

    def enter_training(self) -> None:
        """Hold the components of the phase `train`, in training mode where they train."""
        self._enter("train")
        for name, component in self.components.items():
            component.train(name in self._trained)
            if self.plan.component(name).gradient_checkpointing:
                enable: Any = component.enable_gradient_checkpointing
                enable()

    @contextmanager
    def sampling(self) -> Iterator[Mapping[str, nn.Module]]:
        """Hold the components of the phase `sample` for a while, with averaged weights where they are kept.

        Gradients are let go, as the plan counts; call it between optimizer steps only.
        """
        for parameter in self.trained_parameters().values():
            parameter.grad = None
        averaged = self.ema.swapped() if self.ema is not None else nullcontext()
        try:
            with averaged, self.peaks.phase("sample"):
                self._enter("sample")
                yield self.residency.modules
        finally:
            self.enter_training()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients, the run's precision, averaged weights where they are kept."""
        averaged = self.ema.swapped() if self.ema is not None else nullcontext()
        self.components.eval()
        try:
            with averaged, torch.no_grad(), self.autocast():
                yield
        finally:
            for name, component in self.components.items():
                component.train(name in self._trained)

    def autocast(self) -> Any:
        """The context that arithmetic of this run is done in."""
        return self.trainer.precision_plugin.forward_context()

    def cpu(self) -> Self:
        """Stay on the device: Lightning moves modules to the host when a run ends or fails.

        There the base of an adapter would take as much host memory as it took of the device.
        """
        return self

    def release(self) -> None:
        """Let go of all components and give the device's memory back, e.g. to the next run of a sweep."""
        self.components.clear()
        self.ema = None
        self._step_losses = []
        if hasattr(self, "residency"):
            self.residency.release()

    def _enter(self, phase: Phase) -> None:
        """Hold just the phase's components (and what trains), letting go of others before any is loaded."""
        needed = self.plan.phase(phase).components
        for name in [n for n in self.components if n not in needed and n not in self._trained]:
            del self.components[name]
        self.residency.enter(phase)
        for name, component in self.residency.modules.items():
            if name not in self.components:
                self.components[name] = component

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that trains, in a fixed order."""
        return trained_parameters(self)

    # ---- losses ----------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss (scalar) of one micro-step; `batch` as `framework.data.collate` makes it."""
        losses: dict[str, Tensor] = {}
        global_batch = self.config.data.batch_size * self.trainer.world_size
        places = [batch_idx * global_batch + int(p) for p in batch["positions"].tolist()]
        if self.trains_flow:
            encoded = Batch(
                self._latents(batch),
                self._text(batch),
                places,
                self._data.train_size_px(batch),
                mask=batch.get("mask"),
                noise_seeds=batch.get("noise_seeds"),
            )
            dit = self.components[self.denoiser]
            losses["train/flow_loss"] = self.objective.denoising_loss(encoded, dit)
        if "vae" in self._trained:
            losses["train/vae_loss"] = self.objective.reconstruction_loss(
                batch["pixels"], self.components["vae"], places=places
            )
        total = torch.stack(list(losses.values())).sum()
        losses = losses if len(losses) > 1 else {}
        detached = {name: value.detach() for name, value in losses.items()}
        self._step_losses.append({"train/loss": total.detach(), **detached})
        return total

    def validation_losses(self, batch: dict[str, Any], *, sigma: float, seeds: list[int]) -> Tensor:
        """Loss (B,) of each held-out sample at one noise level; call it inside `evaluating`."""
        latents, text = self._latents(batch), self._text(batch)
        dit = self.components[self.denoiser]
        return self.objective.losses_at(sigma, latents, text, dit, seeds=seeds)

    def reconstruction_errors(self, batch: dict[str, Any]) -> Tensor:
        """Mean absolute error (B,) of the VAE on held-out pictures; call it inside `evaluating`."""
        pixels: Tensor = batch["pixels"]
        reconstruction, _, _ = self.family.reconstruct(pixels, self.components["vae"])
        return (reconstruction - pixels).abs().flatten(1).mean(1)

    @property
    def trains_flow(self) -> bool:
        """Whether the denoiser's loss is part of the run."""
        spec = self.family.spec
        return bool(self._trained & {*spec.denoisers, *spec.text_encoders})

    @property
    def trains_vae(self) -> bool:
        """Whether the reconstruction loss is part of the run."""
        return "vae" in self._trained

    @property
    def _data(self) -> DiffusionDataModule:
        trainer: Any = self.trainer
        data_module = trainer.datamodule
        assert isinstance(data_module, DiffusionDataModule)
        return data_module

    def _latents(self, batch: dict[str, Any]) -> Tensor:
        """Latents (B, C, h, w) float32 from the cache, or encoded now without gradients."""
        if "latents" in batch:
            latents: Tensor = batch["latents"]
            return latents.float()
        with torch.no_grad():
            latents = self.family.encode_image(batch["pixels"], self.components["vae"]).float()
        # Before torch 2.10 autocast gives weights that it cast without gradients to later calls too, and a VAE that
        # trains would get no gradient in its encoder.
        torch.clear_autocast_cache()
        return latents

    def _text(self, batch: dict[str, Any]) -> TextConditioning:
        """Captions and what goes with them from the cache, or encoded now; with gradients where text encoders train."""
        if "captions" in batch:
            text = self._encode_captions(batch)
        else:
            text = TextConditioning(
                batch["text_embeds"], batch["text_mask"], pooled=batch.get("text_pooled")
            )
        controls = batch.get("controls", [])
        if controls and not isinstance(controls[0], Tensor):
            with torch.no_grad():
                controls = [self._encode_controls(place) for place in controls]
        return replace(
            text,
            controls=tuple(control.float() for control in controls),
            geometry=batch["geometry"],
        )

    def _encode_captions(self, batch: dict[str, Any]) -> TextConditioning:
        names = self.family.spec.text_encoders
        encoders = {name: self.components[name] for name in names}
        trains = bool(self._trained & set(names)) and torch.is_grad_enabled()
        # Pictures are given by place, and are shown to the encoder by sample.
        places = batch.get("control_images", batch.get("controls", []))
        shown = list(zip(*places, strict=True)) if places else ()
        with torch.set_grad_enabled(trains):
            return self.family.encode_text(batch["captions"], encoders, controls=shown)

    def _encode_controls(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Latents (B, C, h, w) of the control pictures in one place of each sample."""
        vae = self.components["vae"]
        return torch.cat([self.family.encode_control(picture, vae) for picture in pictures])

    # ---- optimizer -------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The configured optimizer and schedule, stepped once per optimizer step."""
        optimizer = build_optimizer(self.config.optim, self.trained_parameters().items())
        schedule = build_schedule(self.config.optim, optimizer, self.config.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note the gradient norm before clipping and refuse to step on numbers that aren't finite.

        With float16 the loss scaler meets infinite gradients by itself (it skips the step), so only the
        loss is judged there.
        """
        gradients = [p.grad for p in self.trained_parameters().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        losses = torch.stack([each["train/loss"] for each in self._step_losses])
        self.grad_norm = float(norm)
        self.last_lr = float(optimizer.param_groups[0]["lr"])
        judged = (
            losses if self.config.model.compute_dtype == "fp16" else torch.cat([losses, norm[None]])
        )
        if not bool(torch.isfinite(judged).all()):
            raise RunError(
                f"the loss or its gradient is not finite at step {self.global_step + 1}",
                found=f"loss {float(losses.mean())}, gradient norm {self.grad_norm}",
                hint="lower optim.lr, raise optim.warmup_steps, set trainer.gradient_clip_val=1 or "
                "model.compute_dtype=fp32; the last checkpoint is from before this step",
            )

    def take_step_losses(self) -> dict[str, Tensor]:
        """Mean losses of the micro-steps since the last call, on this process."""
        taken, self._step_losses = self._step_losses, []
        return {name: torch.stack([each[name] for each in taken]).mean() for name in taken[0]}

    # ---- hooks of the loop -----------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Put the configured rate over a checkpoint's, and start the clock."""
        schedule = self.lr_schedulers()
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(schedule, LambdaLR)
        assert isinstance(optimizer, Optimizer)
        apply_settings_(optimizer, schedule, self.config.optim)
        # From here on the training bar is on the screen.
        self.residency.watch = unwatched
        self._clock.restart()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock for the next micro-step; the callbacks' time isn't part of it."""
        self._clock.restart()

    # ---- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains: weights, their averages, and the state of the generators."""
        trained = self.trained_parameters()
        checkpoint["state_dict"] = {name: p.detach() for name, p in trained.items()}
        checkpoint["family"] = self.family.spec.name
        checkpoint["optimizer_name"] = self.config.optim.name
        checkpoint["generators"] = generator_states()
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the averages; RunError where the checkpoint is of another model, adapter or optimizer."""
        if checkpoint.get("global_step", 0) > self.config.trainer.max_steps or (
            not self._goes_on and checkpoint.get("global_step") == self.config.trainer.max_steps
        ):
            raise RunError(
                f"the checkpoint has made step {checkpoint['global_step']} already",
                hint="raise trainer.max_steps above it",
            )
        check_trained_state(
            checkpoint,
            self.trained_parameters(),
            family=self.family.spec.name,
            optimizer_name=self.config.optim.name,
        )
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        if self.ema is not None:
            if "ema" in checkpoint:
                self.ema.load_state_dict(checkpoint["ema"])
            else:
                self.ema = TrainableEma(self.trained_parameters(), self.ema.decay)
        restore_generator_states_(checkpoint["generators"])
