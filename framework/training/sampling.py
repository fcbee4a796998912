"""Pictures of the same prompts and noise before, during and after training, and the sheet that shows them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from framework.inference.generate import encode_prompts, read_control, sample_rows
from framework.inference.sheet import as_picture, sample_sheet, save_png, save_sample
from framework.models import SampleSettings, TextConditioning
from framework.schema import SampleConfig
from framework.training.progress import show_work

log = logging.getLogger("octavo")

SAMPLE_FOLDER = "samples"
SHEET_FILE = "samples.png"


class SampleCallback(pl.Callback):
    """Makes the sample pictures on the first process; the others wait.

    run_folder: asked for the run's folder once it is known. A run that goes on keeps the pictures it has; one
    that starts from another run's checkpoint makes its first pictures at that step.
    """

    def __init__(self, config: SampleConfig) -> None:
        self._config = config
        self._last_step = 0
        self.run_dir: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sample before the first step of this run."""
        self._last_step = trainer.global_step
        self._run(trainer, pl_module, only_first=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """Sample where a step is due, and after the last."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        every = self._config.every_n_steps
        if (every and step % every == 0) or step == trainer.max_steps:
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, module: Any, *, only_first: bool = False) -> None:
        if not self._config.prompts:
            return
        if trainer.is_global_zero:
            assert self.run_dir is not None
            rows = read_rows(self.run_dir, len(self._config.prompts))
            if not (only_first and rows):
                # Once training has begun its own bar is on the screen.
                self._sample(trainer, module, self.run_dir, show=only_first)
        trainer.strategy.barrier("samples")

    def _sample(self, trainer: Any, module: Any, run_dir: Path, *, show: bool) -> None:
        step = trainer.global_step
        settings = SampleSettings(
            size_px=self._config.size_px,
            num_inference_steps=self._config.num_inference_steps,
            guidance_scale=self._config.guidance_scale,
            seed=self._config.seed,
            num_frames=self._config.num_frames,
        )
        config = self._config
        controls = [read_control(path) for path in config.control_images]
        rows = self._encode_live(trainer, module, settings, controls)
        if rows is None:
            rows = [
                trainer.datamodule.cached_prompt(prompt, place)
                for place, prompt in enumerate(config.prompts)
            ]
        num_steps = settings.num_inference_steps * len(config.prompts)
        with (
            module.sampling() as modules,
            module.autocast(),
            show_work("making sample pictures", num_steps, enabled=show) as ticker,
        ):
            made = sample_rows(
                module.family,
                rows,
                modules,
                settings,
                controls=controls,
                on_step=lambda done, total: ticker.advance(),
            )
        folder = step_folder(run_dir, step)
        for index, (sample, prompt) in enumerate(zip(made, config.prompts, strict=True)):
            facts = {"prompt": prompt, "seed": str(settings.seed + index), "step": str(step)}
            save_sample(sample, folder / f"{index:02d}.png", facts)
        self._log(trainer, [as_picture(sample) for sample in made])
        write_sheet(run_dir, config.prompts)

    def _encode_live(
        self,
        trainer: Any,
        module: Any,
        settings: SampleSettings,
        controls: list[Image.Image],
    ) -> list[tuple[TextConditioning, TextConditioning | None]] | None:
        """Encode the prompts with text encoders that train, or where nothing is cached; else None."""
        if trainer.datamodule.caches_prompts:
            return None
        names = module.family.spec.text_encoders
        with module.evaluating():
            return encode_prompts(
                module.family,
                {name: module.components[name] for name in names},
                self._config.prompts,
                self._config.negative_prompt,
                settings,
                controls,
            )

    def _log(self, trainer: pl.Trainer, pictures: list[Image.Image]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for index, picture in enumerate(pictures):
                    logger.experiment.add_image(
                        f"samples/{index:02d}",
                        np.asarray(picture.convert("RGB")),
                        trainer.global_step,
                        dataformats="HWC",
                    )


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the pictures made after `step` optimizer steps."""
    return run_dir / SAMPLE_FOLDER / f"step-{step:06d}"


def read_rows(run_dir: Path, num_prompts: int) -> list[tuple[int, list[Path]]]:
    """(step, one picture per prompt) of each step whose pictures are all there, in order of steps."""
    rows = []
    for folder in (run_dir / SAMPLE_FOLDER).glob("step-*"):
        pictures = [folder / f"{index:02d}.png" for index in range(num_prompts)]
        if all(picture.is_file() for picture in pictures):
            rows.append((int(folder.name.removeprefix("step-")), pictures))
    return sorted(rows)


def write_sheet(run_dir: Path, prompts: tuple[str, ...]) -> Path | None:
    """Write samples.png: one row per sampled step, one column per prompt; None where there are no pictures."""
    rows = read_rows(run_dir, len(prompts))
    if not prompts or not rows:
        return None
    titled = []
    for step, paths in rows:
        title = "before" if step == 0 else f"step {step}"
        titled.append((title, [Image.open(path).convert("RGB") for path in paths]))
    save_png(sample_sheet(titled, prompts), run_dir / SHEET_FILE)
    return run_dir / SHEET_FILE
