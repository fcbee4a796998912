"""From the claim of a run's folder to its last file."""

from __future__ import annotations

import logging
import time
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from framework.atomic import write_text
from framework.plan.table import plan_json, render_plan
from framework.plan.types import VramPlan
from framework.schema import RunConfig
from framework.training.checkpointing import CheckpointCallback
from framework.training.memory import compare_peaks, describe_peaks, peak_memory_bytes
from framework.training.metrics import MetricsCallback
from framework.training.results import RunResult, save_results
from framework.training.run_folder import RunFolder, RunStart, read_state
from framework.training.run_log import build_loggers
from framework.training.sampling import SampleCallback, write_sheet

_PLAN_WIDTH = 120

log = logging.getLogger("octavo")


class RunLifecycle(pl.Callback):
    """Claims the folder on the first process, tells the others, opens the logs, and saves what was trained.

    Must stand first among the callbacks, because the others write into the folder.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        config_yaml: str,
        plan: VramPlan,
        start: RunStart,
        metrics: MetricsCallback,
        writers: tuple[SampleCallback, CheckpointCallback],
    ) -> None:
        self._config = config
        self._config_yaml = config_yaml
        self._plan = plan
        self._start = start
        self._metrics = metrics
        self._writers = writers
        self._folder: RunFolder | None = None
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self.run_dir: Path | None = None
        self.result: RunResult | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Claim and describe the folder; all samples have been checked by now."""
        pl_module.peaks.watch(trainer.strategy.root_device)
        if trainer.is_global_zero:
            self._folder = RunFolder.claim(self._start)
            self._seconds_before = float(read_state(self._folder.path).get("seconds", 0.0))
            self._describe(self._folder)
            if self._start.checkpoint is not None:
                log.info("going on from %s in %s", self._start.checkpoint, self._folder.path)
        path = str(self._folder.path) if self._folder is not None else None
        self.run_dir = Path(str(trainer.strategy.broadcast(path, src=0)))
        for writer in self._writers:
            writer.run_dir = self.run_dir
        self._writers[1].on_saved = self._note_time
        trainer.loggers = build_loggers(
            self._config, self.run_dir, resume_step=self._start.resume_step
        )

    def _describe(self, folder: RunFolder) -> None:
        sources = {c.name: {"source": c.source, "commit": c.commit} for c in self._plan.components}
        folder.begin(self._config, config_yaml=self._config_yaml, sources=sources)
        write_text(folder.path / "plan.json", plan_json(self._plan) + "\n")
        write_text(folder.path / "plan.txt", _plan_text(self._plan))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """The peak of a step begins here, and ends before validation, samples and checkpoint."""
        pl_module.peaks.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """Note the peak of the step."""
        pl_module.peaks.end("train")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was trained."""
        self.finish(trainer, pl_module)

    def finish(self, trainer: pl.Trainer, module: Any) -> None:
        """Save results and mark the run finished; also for a run that was killed in the midst of this."""
        assert self.run_dir is not None
        lora = model = sheet = None
        if self._folder is not None:
            with module.peaks.phase("save"):
                lora, model = save_results(module, self.run_dir, steps=trainer.global_step)
            sheet = write_sheet(self.run_dir, self._config.sample.prompts)
            peaks = compare_peaks(self._plan, module.peaks)
            self._folder.write_state(
                state="finished",
                step=trainer.global_step,
                seconds=self._seconds(),
                peak_memory=peaks,
            )
            if peaks:
                log.info("%s", describe_peaks(self._plan, peaks))
        self.result = RunResult(
            run_dir=self.run_dir,
            steps=trainer.global_step,
            lora_path=lora,
            model_path=model,
            sheet_path=sheet,
            last_train_loss=self._metrics.last_loss,
            val_loss=self._metrics.last_validation,
            peak_memory_bytes=peak_memory_bytes(trainer.strategy.root_device),
            is_first_process=self._folder is not None,
        )

    def _seconds(self) -> float:
        """Time that the run has taken over all its starts; what was lost after a checkpoint isn't counted."""
        return round(self._seconds_before + time.monotonic() - self._began, 1)

    def _note_time(self) -> None:
        if self._folder is not None:
            self._folder.write_state(seconds=self._seconds())

    def release(self) -> None:
        """Give the folder's lock back."""
        if self._folder is not None:
            self._folder.release()


def _plan_text(plan: VramPlan) -> str:
    """The plan as `octavo plan` shows it, without colours."""
    console = Console(file=StringIO(), width=_PLAN_WIDTH, force_terminal=False, color_system=None)
    console.print(render_plan(plan))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()
