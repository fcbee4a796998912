"""`octavo train`: judge the configuration, train, and say where the results are and what to try next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from framework.cli.configuration import config_text, is_first_process, judged_config
from framework.cli.report import error_console, output_console
from framework.schema.run import RunConfig

if TYPE_CHECKING:
    from framework.training.results import RunResult


def run_training(overrides: Sequence[str]) -> None:
    """Train. Raises ConfigError before torch is imported or anything is written, other OctavoErrors later."""
    with judged_config(overrides, use="train") as config:
        if is_first_process():
            error_console().print(
                Text("The configuration is valid; starting torch ...", style="dim")
            )
        from framework.training.fit import fit

        result = fit(config, config_yaml=config_text(config))
    if result.is_first_process:
        print_summary(result, config, overrides)


def print_summary(result: RunResult, config: RunConfig, overrides: Sequence[str]) -> None:
    """Print the last lines of a run: losses, where everything is, and two commands to try next."""
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
    console.print(Text("Try next:", style="bold"))
    for command in next_commands(result, config, overrides):
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
