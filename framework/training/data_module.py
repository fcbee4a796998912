"""The data of a run: checked, split, encoded once where encoders are frozen, and dealt out in micro-steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from framework.data import (
    BatchPlan,
    CheckedSample,
    EncodedCache,
    EncodedSource,
    TrainingDataset,
    build_train_loader,
    build_validation_loader,
    check_samples,
    hold_out,
    make_buckets,
    read_samples,
    text_key,
)
from framework.hub import locate_extra
from framework.models import Family, TextConditioning
from framework.models.base import evaluating
from framework.plan.types import VramPlan
from framework.runtime.residency import Residency
from framework.schema import RunConfig
from framework.training.encode_lock import encoding_alone
from framework.training.fingerprint import read_encoder_identity
from framework.training.progress import show_work

log = logging.getLogger("octavo")


class DiffusionDataModule(pl.LightningDataModule):
    """Reads the samples in `setup`, encodes them in `encode`, and feeds the loop from any micro-step on."""

    def __init__(self, config: RunConfig, *, plan: VramPlan, family: Family) -> None:
        super().__init__()
        self._config = config
        self._plan = plan
        self._family = family
        self._start_micro_step = 0
        self.train_set: TrainingDataset
        self.validation_set: TrainingDataset | None = None
        model, data = config.model, config.data
        trains_flow = model.dit.trainable != "none" or model.text_encoder.trainable != "none"
        self._caches_latents = data.cache and model.vae.trainable == "none" and trains_flow
        self._caches_text = data.cache and model.text_encoder.trainable == "none" and trains_flow
        self.caches_prompts = data.cache and model.text_encoder.trainable == "none"
        self._encoded = EncodedSource(EncodedCache(Path(data.cache_dir).expanduser()))
        self._prompt_encoder: str | None = None

    # ---- samples ---------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check every picture once per machine, before the other processes ask for the results."""
        self._checked_samples(show=True)

    def setup(self, stage: str) -> None:
        """Read and split the samples; raises DataError before anything is loaded or written."""
        config = self._config
        train, held_out = hold_out(
            self._checked_samples(show=False),
            fraction=config.validation.fraction,
            seed=config.validation.seed,
            max_samples=config.validation.max_samples,
        )
        self._encoded = self._find_encoders()
        self.train_set = self._dataset(train, caption_dropout=config.data.caption_dropout)
        self.validation_set = self._dataset(held_out, caption_dropout=0.0) if held_out else None

    def _checked_samples(self, *, show: bool) -> list[CheckedSample]:
        data = self._config.data
        samples = read_samples(data)
        with show_work("checking pictures", len(samples), enabled=show) as ticker:
            report = check_samples(
                samples,
                on_bad_sample=data.on_bad_sample,
                cache_dir=self._encoded.cache.folder,
                on_progress=lambda done, total: ticker.advance(),
            )
        if report.skipped and show:
            names = ", ".join(bad.sample.name for bad in report.skipped[:5])
            log.warning("%d pictures can't be read and are skipped: %s", len(report.skipped), names)
        return list(report.samples)

    def _dataset(self, samples: list[CheckedSample], *, caption_dropout: float) -> TrainingDataset:
        data = self._config.data
        return TrainingDataset(
            samples,
            buckets=make_buckets(
                data.max_px,
                divisor_px=self._family.spec.size_divisor_px,
                max_aspect_ratio=data.max_aspect_ratio,
            ),
            encoded=self._encoded,
            caption_dropout=caption_dropout,
            seed=self._config.trainer.seed,
        )

    # ---- encoding --------------------------------------------------------------------------------

    def _find_encoders(self) -> EncodedSource:
        """Name the frozen encoders by their content, so that no entry of another encoder is met."""
        cache, model = self._encoded.cache, self._config.model
        stamps = cache.folder / "weights"
        latents_encoder = text_encoder = None
        if self._caches_latents:
            latents_encoder = read_encoder_identity(
                self._plan, self._plan.component("vae"), stamp_folder=stamps
            )
        if self._caches_text or (self.caches_prompts and self._config.sample.prompts):
            self._prompt_encoder = read_encoder_identity(
                self._plan,
                self._plan.component("text_encoder"),
                stamp_folder=stamps,
                tokenizer=locate_extra(model.source, "tokenizer", revision=model.revision),
            )
            text_encoder = self._prompt_encoder if self._caches_text else None
        return EncodedSource(cache, latents_encoder, text_encoder)

    def encode(self, residency: Residency) -> None:
        """Encode what the cache lacks: pictures, captions, prompts; the processes share the work.

        The encoders are loaded only where something is missing, and stay loaded until the next phase. Of several runs
        that lack the same, one encodes and the others wait for it.
        """
        trainer = self.trainer
        assert trainer is not None
        strategy, rank, world = trainer.strategy, trainer.global_rank, trainer.world_size
        pictures, texts = self._missing()
        if not strategy.reduce_boolean_decision(bool(pictures or texts), all=False):
            return
        encoders = [e for e in (self._encoded.latents_encoder, self._prompt_encoder) if e]
        folder = self._encoded.cache.folder
        with encoding_alone(folder, encoders, strategy=strategy, is_first=rank == 0):
            pictures, texts = self._missing()  # another run may have been here
            # Nobody may write before everybody has seen what is missing, or the shares would differ.
            strategy.barrier("missing entries")
            if pictures or texts:
                residency.enter("encode")
                self._encode_pictures(residency, pictures[rank::world], show=rank == 0)
                self._encode_texts(residency, texts[rank::world], show=rank == 0)
            strategy.barrier("encoded entries")

    def _missing(self) -> tuple[list[tuple[TrainingDataset, int]], list[str]]:
        """What the cache lacks: pictures as (set, index), and captions and prompts, each once."""
        sets = [s for s in (self.train_set, self.validation_set) if s is not None]
        pictures = [(data, index) for data in sets for index in data.missing_latents()]
        texts = dict.fromkeys(c for data in sets for c in data.missing_captions())
        texts.update(dict.fromkeys(self._missing_prompts()))
        return pictures, list(texts)

    def _encode_pictures(
        self, residency: Residency, pictures: list[tuple[TrainingDataset, int]], *, show: bool
    ) -> None:
        """One at a time, because the last bits of a result may depend on the batch it was computed in."""
        if not pictures:
            return
        vae = residency.modules["vae"]
        with (
            torch.no_grad(),
            evaluating([vae]),
            show_work("encoding pictures", len(pictures), enabled=show) as ticker,
        ):
            for dataset, index in pictures:
                latents = self._family.encode_image(dataset.pixels(index)[None], vae)
                dataset.put_latents(index, latents[0])
                ticker.advance()

    def _encode_texts(self, residency: Residency, texts: list[str], *, show: bool) -> None:
        if not texts:
            return
        assert self._prompt_encoder is not None
        text_encoder = residency.modules["text_encoder"]
        with (
            torch.no_grad(),
            evaluating([text_encoder]),
            show_work("encoding captions", len(texts), enabled=show) as ticker,
        ):
            for text in texts:
                row = self._family.encode_text([text], text_encoder).row(0)
                key = text_key(text, encoder=self._prompt_encoder)
                self._encoded.cache.put("text", key, row.embeds[0])
                ticker.advance()

    def _missing_prompts(self) -> list[str]:
        if not self.caches_prompts or self._prompt_encoder is None:
            return []
        encoder = self._prompt_encoder
        by_key = {text_key(prompt, encoder=encoder): prompt for prompt in self._prompts()}
        return [by_key[key] for key in self._encoded.cache.missing("text", by_key)]

    def _prompts(self) -> list[str]:
        sample = self._config.sample
        if not sample.prompts:
            return []
        guided = sample.guidance_scale > 1
        return [*sample.prompts, *([sample.negative_prompt] if guided else [])]

    def cached_prompt(self, prompt: str) -> TextConditioning:
        """A prompt's encoding from the cache; only where `caches_prompts`."""
        assert self._prompt_encoder is not None
        key = text_key(prompt, encoder=self._prompt_encoder)
        embeds = self._encoded.cache.get("text", key)
        assert embeds is not None, "prompts are encoded before training"
        mask = torch.ones(1, embeds.shape[0], dtype=torch.bool)
        return TextConditioning(embeds[None], mask)

    # ---- loaders ---------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's batches without end, from the micro-step that the run has reached."""
        data, trainer = self._config.data, self.trainer
        assert trainer is not None
        plan = BatchPlan(
            self.train_set.bucket_of,
            batch_size=data.batch_size,
            seed=self._config.trainer.seed,
            repeats=data.repeats,
            world_size=trainer.world_size,
        )
        return build_train_loader(
            self.train_set,
            plan,
            start=self._start_micro_step,
            rank=trainer.global_rank,
            num_workers=data.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def validation_loader(self) -> DataLoader[Any] | None:
        """This process's share of the held-out samples; None where nothing is held out.

        Not called `val_dataloader`, because validation here runs by optimizer steps, before the checkpoint
        of its step is written, and not in Lightning's own loop.
        """
        trainer = self.trainer
        assert trainer is not None
        if self.validation_set is None:
            return None
        return build_validation_loader(
            self.validation_set,
            batch_size=self._config.data.batch_size,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
        )

    def train_size_px(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Width and height of a training batch's pictures."""
        return self.train_set.bucket_of[int(batch["indices"][0])]

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The next micro-step; with it the stream of batches goes on where it was."""
        assert self.trainer is not None
        return {"micro_step": self.trainer.fit_loop.epoch_loop.total_batch_idx + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's micro-step."""
        self._start_micro_step = int(state_dict["micro_step"])
