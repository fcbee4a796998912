"""`octavo train`: judge the configuration, train, and say where the results are and what to try next."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from framework.atomic import write_text
from framework.cli.configuration import config_text, is_first_process, judged_config
from framework.cli.report import error_console, output_console
from framework.errors import ConfigError, OctavoError, RunError, RunStopped
from framework.schema.run import RunConfig

if TYPE_CHECKING:
    from framework.training.results import RunResult


def run_training(
    overrides: Sequence[str], *, config_dir: Path | None = None, summary: Path | None = None
) -> None:
    """Train. Raises ConfigError before torch is imported or anything is written, other OctavoErrors later.

    summary: file that says as JSON how the run ended, however it ended; for scripts and sweeps.
    """
    if summary is None:
        result, config = _train(overrides, config_dir)
        if result.is_first_process:
            print_commands(next_commands(result, config, overrides))
        return
    _check_writable(summary)
    started = time.monotonic()
    try:
        result, _ = _train(overrides, config_dir)
    except BaseException as error:
        _write_summary(summary, started, _ending(error))
        raise
    _write_summary(summary, started, {"state": "finished", "exit_code": 0, **_outcome(result)})


def _train(overrides: Sequence[str], config_dir: Path | None) -> tuple[RunResult, RunConfig]:
    with judged_config(overrides, use="train", config_dir=config_dir) as config:
        if is_first_process():
            error_console().print(
                Text("The configuration is valid; starting torch ...", style="dim")
            )
        from framework.training.fit import fit

        result = fit(config, config_yaml=config_text(config))
    if result.is_first_process:
        print_summary(result, config)
    return result, config


def _check_writable(summary: Path) -> None:
    """Refuse a summary that can't be written before hours are spent."""
    if summary.is_dir() or not summary.absolute().parent.is_dir():
        found = "a folder" if summary.is_dir() else "its folder doesn't exist"
        hint = "Give --summary a file in a folder that exists."
        raise RunError("the summary can't be written", where=str(summary), found=found, hint=hint)


def _write_summary(file: Path, started: float, ending: dict[str, Any]) -> None:
    """Write the first process's account; `seconds` is of this process, also where it went on with a run."""
    if is_first_process():
        content = {"version": 1, **ending, "seconds": round(time.monotonic() - started, 3)}
        write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _outcome(result: RunResult) -> dict[str, Any]:
    paths = {
        "run_dir": result.run_dir,
        "lora_path": result.lora_path,
        "model_path": result.model_path,
        "sheet_path": result.sheet_path,
    }
    return {
        "error": None,
        **{name: None if path is None else str(path) for name, path in paths.items()},
        "steps": result.steps,
        "train_loss": _finite(result.last_train_loss),
        "val_loss": _finite(result.val_loss),
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def _finite(number: float | None) -> float | str | None:
    """JSON has no NaN or infinity; they are written as texts, so that no reader takes them for a missing value."""
    return number if number is None or math.isfinite(number) else str(number)


def _ending(error: BaseException) -> dict[str, Any]:
    """How a run ended that didn't finish."""
    if isinstance(error, RunStopped | KeyboardInterrupt) or _interrupted(error):
        return {"state": "stopped", "exit_code": getattr(error, "exit_code", 130), "error": None}
    code = error.exit_code if isinstance(error, OctavoError) else 1
    told: dict[str, Any] = {"message": f"{type(error).__name__}: {error}"}
    if isinstance(error, OctavoError):
        told = {
            "message": error.message,
            "where": error.where,
            "found": error.found,
            "hint": error.hint,
        }
    if isinstance(error, ConfigError):
        told["faults"] = [asdict(fault) for fault in error.faults]
    return {"state": "failed", "exit_code": code, "error": told}


def _interrupted(error: BaseException) -> bool:
    """Lightning catches Ctrl+C itself, tears the run down and leaves with exit()."""
    return isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)


def print_summary(result: RunResult, config: RunConfig) -> None:
    """Print the last lines of a run: losses, and where everything is."""
    console = output_console()
    losses = [("training loss", result.last_train_loss), ("validation loss", result.val_loss)]
    told = "".join(f", {name} {loss:.4f}" for name, loss in losses if loss is not None)
    memory = f"{result.peak_memory_bytes / 2**30:.1f} GiB at most"
    console.print(Text(f"Done: {result.steps} steps{told}, {memory}.", style="bold green"))
    folder = shown(result.run_dir)
    places = [("Run folder", folder)]
    results = [
        ("LoRA", result.lora_path),
        ("Model", result.model_path),
        ("Sample sheet", result.sheet_path),
    ]
    places += [(name, shown(path)) for name, path in results if path is not None]
    if config.logger.tensorboard:
        logs = [program("tensorboard"), "--logdir", f"{folder}/tensorboard"]
        places.append(("Logs", shlex.join(logs)))
    if config.logger.csv:
        places.append(("Losses", f"{folder}/metrics.csv"))
    for name, place in places:
        console.print(f"  {name:<13}{place}")


def print_commands(commands: Sequence[str]) -> None:
    """Print what a person may try next; a script that asked for a summary needs no such lines."""
    console = output_console()
    console.print(Text("Try next:", style="bold"))
    for command in commands:
        console.print(f"  {command}")


def next_commands(result: RunResult, config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Shell commands that go on from here: pictures with the new LoRA, and the same run with one thing changed."""
    commands = []
    prompt = config.sample.prompts[0] if config.sample.prompts else "a picture of ..."
    trained = [
        f"model.{name}.source={shown(result.model_path)}"
        for name, component in config.model.components.items()
        if component.trainable == "full" and result.model_path is not None
    ]
    lora = ["--lora", shown(result.lora_path)] if result.lora_path is not None else []
    if trained or lora:
        read = [
            line
            for line in overrides
            if line.lstrip("+~").startswith(("recipe=", "model.", "model=", "sample."))
        ]
        read = [line for line in read if not line.lstrip("+").startswith("sample.prompts")]
        command = [program("octavo"), "generate", *read, *trained, *lora, "--prompt", prompt]
        commands.append(shlex.join(command))
    for name, component in config.model.components.items():
        if component.trainable == "lora":
            rank = 2 * (component.lora.rank if component.lora else 16)
            change = f"model.{name}.lora.rank={rank}"
            break
    else:
        change = f"optim.lr={config.optim.lr / 2:g}"
    kept = [
        line for line in overrides if line.partition("=")[0].lstrip("+") != change.partition("=")[0]
    ]
    script = Path(sys.argv[0]).name == "train.py"
    start = [program("python"), sys.argv[0]] if script else [program("octavo"), "train"]
    return [*commands, shlex.join([*start, *kept, change])]


def shown(path: Path) -> str:
    """Write a path as a person would type it: relative to the current folder where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def program(name: str) -> str:
    """How to call a program of this environment from the user's shell: its name if that finds it, else its path."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not own.exists() or (found is not None and Path(found).parent == own.parent):
        return name
    return shown(own)
