"""What a person sees while the run goes on: one bar in a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from framework.plan.types import ComponentPlan
from framework.training.memory import format_bytes, peak_memory_bytes
from framework.training.metrics import MetricsCallback

log = logging.getLogger("octavo")
# Less is read before a person could look.
_WORTH_A_BAR_BYTES = 256 * 2**20
# One console for bars and log lines, so that neither tears the other.
CONSOLE = Console(stderr=True)


@contextmanager
def show_log() -> Iterator[None]:
    """Show this package's log lines on standard error, unless the program has its own handler for them."""
    if log.handlers or logging.getLogger().handlers:
        yield
        return
    handler: logging.Handler
    if CONSOLE.is_terminal:
        handler = RichHandler(console=CONSOLE, show_path=False, show_level=False)
    else:
        # In a file or a pipe nothing is folded, so that a path stays one word.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class Ticker:
    """Counts work that is done; shows a bar in a terminal and nothing elsewhere."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        """Report `count` more pieces as done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)


@contextmanager
def show_work(title: str, total: int, *, enabled: bool = True) -> Iterator[Ticker]:
    """Show a bar for `total` pieces of work; a log line where standard error is no terminal."""
    if not enabled or total == 0:
        yield Ticker(None, None)
        return
    if not CONSOLE.is_terminal:
        log.info("%s: %d", title, total)
        yield Ticker(None, None)
        return
    with _bar() as progress:
        yield Ticker(progress, progress.add_task(title, total=total, facts=""))


@contextmanager
def show_loading(part: ComponentPlan) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes while a component's weights are read; nothing where that is over at once.

    Without a terminal it is a log line. Gives the function that is told the bytes read since the last call.
    """
    total = part.source_bytes
    if not CONSOLE.is_terminal or total < _WORTH_A_BAR_BYTES:
        if total >= _WORTH_A_BAR_BYTES:
            log.info("reading the weights of %s: %s", part.name, format_bytes(total))
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE, transient=True) as progress:
        task = progress.add_task(f"reading {part.name}", total=total)
        yield lambda count: progress.advance(task, count)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=CONSOLE,
    )


class StepProgress(pl.Callback):
    """Shows optimizer steps, loss, step time, memory and the time that is left.

    Without a terminal it logs a line whenever a row of metrics is written.
    """

    def __init__(self, metrics: MetricsCallback) -> None:
        self._metrics = metrics
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar on the first process."""
        self._last_step = trainer.global_step
        if not trainer.is_global_zero or not CONSOLE.is_terminal:
            return
        self._progress = _bar()
        self._progress.start()
        self._task = self._progress.add_task(
            "training", total=trainer.max_steps, completed=trainer.global_step, facts=""
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Update after each optimizer step."""
        if trainer.global_step == self._last_step or not trainer.is_global_zero:
            return
        self._last_step = trainer.global_step
        facts = self._facts(pl_module)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._last_step, facts=facts)
        elif self._metrics.wrote_row:
            log.info("step %d/%d  %s", self._last_step, trainer.max_steps, facts)

    def _facts(self, module: pl.LightningModule) -> str:
        memory = format_bytes(peak_memory_bytes(module.device))
        facts = f"loss {self._metrics.last_loss:.4f}  {self._metrics.last_step_seconds:.2f} s/step"
        if self._metrics.last_validation is not None:
            facts += f"  val {self._metrics.last_validation:.4f}"
        return f"{facts}  {memory}"

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar down."""
        self.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar down, so that the error stands alone."""
        self.close()
