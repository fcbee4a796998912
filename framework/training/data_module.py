"""The data of a run: checked, split, encoded once where encoders are frozen, and dealt out in micro-steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from framework.data import (
    BatchPlan,
    CheckedSample,
    EncodedCache,
    EncodedSource,
    Media,
    TrainingDataset,
    build_train_loader,
    build_validation_loader,
    check_samples,
    content_key,
    hold_out,
    make_buckets,
    read_samples,
    resolve_repeats,
    size_px_of,
    text_key,
)
from framework.errors import DataError
from framework.hub import locate_extra
from framework.inference.generate import read_control
from framework.models import Family, TextConditioning
from framework.models.base import evaluating
from framework.plan.types import VramPlan
from framework.runtime.residency import Residency
from framework.schema import RunConfig
from framework.training.encode_lock import encoding_alone
from framework.training.fingerprint import read_encoder_identity
from framework.training.progress import show_work

log = logging.getLogger("octavo")


@dataclass(frozen=True)
class TextWork:
    """A caption to be encoded.   controls: reads the control pictures that are shown with it."""

    caption: str
    controls: Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Work:
    """What the cache lacks.

    pictures, controls: (set, index), whose latents are missing.   texts: by their keys in the cache.
    """

    pictures: list[tuple[TrainingDataset, int]]
    controls: list[tuple[TrainingDataset, int]]
    texts: dict[str, TextWork]

    def __bool__(self) -> bool:
        return bool(self.pictures or self.controls or self.texts)

    def share(self, rank: int, world: int) -> Work:
        """One process's part."""
        mine = list(self.texts)[rank::world]
        return Work(
            self.pictures[rank::world],
            self.controls[rank::world],
            {key: self.texts[key] for key in mine},
        )


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
        components, data, spec = config.model.components, config.data, family.spec
        trained = {name for name, part in components.items() if part.trainable != "none"}
        trains_flow = bool(trained & {*spec.denoisers, *spec.text_encoders})
        self._caches_latents = data.cache and "vae" not in trained and trains_flow
        self.caches_prompts = data.cache and not trained & set(spec.text_encoders)
        self._caches_text = self.caches_prompts and trains_flow
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
        if config.objective.name == "direct_distill":
            _check_seeds(train)
        self._encoded = self._find_encoders()
        self.train_set = self._dataset(train, caption_dropout=config.data.caption_dropout)
        self.validation_set = self._dataset(held_out, caption_dropout=0.0) if held_out else None

    def _checked_samples(self, *, show: bool) -> list[CheckedSample]:
        data = self._config.data
        samples = read_samples(data, self._media)
        with show_work("checking pictures", len(samples), enabled=show) as ticker:
            report = check_samples(
                samples,
                on_bad_sample=data.on_bad_sample,
                media=self._media,
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
            media=self._media,
        )

    @property
    def _media(self) -> Media:
        """What the family trains on."""
        spec, data = self._family.spec, self._config.data
        if spec.media == "video":
            return Media(
                "video",
                num_frames=data.num_frames,
                fps=data.fps,
                frame_divisor=spec.frame_divisor,
            )
        return Media(num_controls=spec.num_controls, control_size=type(self._family).control_size)

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
            tokenizers = [
                locate_extra(model.source, folder, revision=model.revision)
                for name, folder in self._family.spec.extras.items()
                if name != "scheduler"
            ]
            identities = [
                read_encoder_identity(
                    self._plan,
                    self._plan.component(name),
                    stamp_folder=stamps,
                    tokenizers=tokenizers,
                )
                for name in self._family.spec.text_encoders
            ]
            self._prompt_encoder = "+".join(identities)
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
        work = self._missing()
        if not strategy.reduce_boolean_decision(bool(work), all=False):
            return
        encoders = [e for e in (self._encoded.latents_encoder, self._prompt_encoder) if e]
        folder = self._encoded.cache.folder
        with encoding_alone(folder, encoders, strategy=strategy, is_first=rank == 0):
            work = self._missing()  # another run may have been here
            # Nobody may write before everybody has seen what is missing, or the shares would differ.
            strategy.barrier("missing entries")
            if work:
                residency.enter("encode")
                share = work.share(rank, world)
                self._encode_pictures(residency, share, show=rank == 0)
                self._encode_texts(residency, share, show=rank == 0)
            strategy.barrier("encoded entries")

    def _missing(self) -> Work:
        """What the cache lacks, each once."""
        sets = [s for s in (self.train_set, self.validation_set) if s is not None]
        texts: dict[str, TextWork] = {}
        for data in sets:
            for request in data.missing_captions():
                read = partial(data.control_images, request.index)
                texts.setdefault(data.text_key(request), TextWork(request.caption, read))
        texts |= self._missing_prompts()
        return Work(
            pictures=[(data, index) for data in sets for index in data.missing_latents()],
            controls=[(data, index) for data in sets for index in data.missing_controls()],
            texts=texts,
        )

    def _encode_pictures(self, residency: Residency, work: Work, *, show: bool) -> None:
        """One at a time, because the last bits of a result may depend on the batch it was computed in."""
        count = len(work.pictures) + len(work.controls)
        if not count:
            return
        vae = residency.modules["vae"]
        with (
            torch.no_grad(),
            evaluating([vae]),
            show_work("encoding pictures", count, enabled=show) as ticker,
        ):
            for dataset, index in work.pictures:
                latents = self._family.encode_image(dataset.pixels(index)[None], vae)
                dataset.put_latents(index, latents[0])
                ticker.advance()
            for dataset, index in work.controls:
                pictures = dataset.control_images(index)
                encoded = [self._family.encode_control(each, vae)[0] for each in pictures]
                dataset.put_controls(index, encoded)
                ticker.advance()

    def _encode_texts(self, residency: Residency, work: Work, *, show: bool) -> None:
        if not work.texts:
            return
        encoders = {name: residency.modules[name] for name in self._family.spec.text_encoders}
        with (
            torch.no_grad(),
            evaluating(list(encoders.values())),
            show_work("encoding captions", len(work.texts), enabled=show) as ticker,
        ):
            for key, text in work.texts.items():
                pictures = text.controls()
                shown = [pictures] if pictures else ()
                row = self._family.encode_text([text.caption], encoders, controls=shown).row(0)
                self._encoded.cache.put("text", key, row.tensors())
                ticker.advance()

    def _missing_prompts(self) -> dict[str, TextWork]:
        if not self.caches_prompts or self._prompt_encoder is None:
            return {}
        sample = self._config.sample
        guided = self._family.spec.guides(sample.guidance_scale)
        found = {}
        for place, prompt in enumerate(sample.prompts):
            for text in (prompt, *((sample.negative_prompt,) if guided else ())):
                read = partial(self._prompt_controls, place)
                found[self._prompt_key(text, place)] = TextWork(text, read)
        return {key: found[key] for key in self._encoded.cache.missing("text", found)}

    def _prompt_controls(self, place: int) -> list[Image.Image]:
        paths = self._config.sample.control_images
        return [read_control(paths[place])] if paths else []

    def _prompt_key(self, text: str, place: int) -> str:
        assert self._prompt_encoder is not None
        paths = self._config.sample.control_images
        keys = [content_key(Path(paths[place]).expanduser().read_bytes())] if paths else []
        return text_key(text, encoder=self._prompt_encoder, control_keys=keys)

    def cached_prompt(
        self, prompt: str, place: int
    ) -> tuple[TextConditioning, TextConditioning | None]:
        """Sample prompt number `place` and, if guided, what leads away; only where `caches_prompts`."""
        sample = self._config.sample
        guided = self._family.spec.guides(sample.guidance_scale)
        positive = self._cached_text(self._prompt_key(prompt, place))
        if not guided:
            return positive, None
        return positive, self._cached_text(self._prompt_key(sample.negative_prompt, place))

    def _cached_text(self, key: str) -> TextConditioning:
        tensors = self._encoded.cache.get("text", key)
        assert tensors is not None, "prompts are encoded before training"
        return TextConditioning.from_tensors(tensors)

    # ---- loaders ---------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's batches without end, from the micro-step that the run has reached."""
        data, trainer = self._config.data, self.trainer
        assert trainer is not None
        plan = BatchPlan(
            self.train_set.bucket_of,
            batch_size=data.batch_size,
            seed=self._config.trainer.seed,
            repeats=resolve_repeats([s.sample for s in self.train_set.samples], data),
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
        return size_px_of(self.train_set.bucket_of[int(batch["indices"][0])])

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The next micro-step; with it the stream of batches goes on where it was."""
        assert self.trainer is not None
        return {"micro_step": self.trainer.fit_loop.epoch_loop.total_batch_idx + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's micro-step."""
        self._start_micro_step = int(state_dict["micro_step"])


def _check_seeds(samples: Sequence[CheckedSample]) -> None:
    """Distillation compares pictures of the same noise: without its seed a teacher's picture is of no use."""
    lacking = [each.sample.name for each in samples if each.sample.noise_seed is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(samples)} pictures have no seed, which objective.name=direct_distill needs",
            found=f"first: {lacking[0]}",
            hint="make the pictures with a teacher of the same family and size, and write the seed of each into the "
            "column `seed` of metadata.csv; `octavo generate` names it in the PNG",
        )
