"""`octavo generate`: pictures from the model that a recipe describes, with the plan that training uses too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress
from rich.text import Text

from framework.cli.configuration import judged_config
from framework.cli.report import error_console, output_console
from framework.errors import ConfigError, Fault, SourceError
from framework.plan.types import ComponentPlan
from framework.schema.run import RunConfig


def run_generation(
    overrides: Sequence[str],
    *,
    prompts: Sequence[str],
    lora: Path | None,
    out: Path,
    config_dir: Path | None = None,
) -> None:
    """Make one picture per prompt and write them below `out`; no file is overwritten.

    prompts: empty means those of the recipe.
    Raises ConfigError before torch is imported; SourceError or PlanError before pictures are made.
    """
    with judged_config(overrides, use="generate", config_dir=config_dir) as config:
        wanted = tuple(prompts) or config.sample.prompts
        if not wanted:
            hint = 'Give it as --prompt "a red apple", once for each picture.'
            raise ConfigError(
                [
                    Fault(
                        "",
                        "there is no prompt, and the recipe has none in sample.prompts",
                        hint=hint,
                    )
                ]
            )
        if lora is not None and not lora.exists():
            hint = "A run writes its LoRA into its run folder, named in its last lines."
            raise SourceError(f"the LoRA {lora} doesn't exist", hint=hint)
        if out.exists() and not out.is_dir():
            message = f"{str(out)!r} is a file, but pictures need a folder"
            raise ConfigError([Fault("--out", message, f"command line: --out {out}")])
        error_console().print(Text("The configuration is valid; starting torch ...", style="dim"))
        paths = _generate(config, wanted, lora, out)
    for path in paths:
        output_console().print(str(path))


def _generate(
    config: RunConfig,
    prompts: Sequence[str],
    lora: Path | None,
    out: Path,
) -> list[Path]:
    from framework.inference.generate import generate, write_images
    from framework.models.base import SampleSettings

    settings = SampleSettings(
        size_px=config.sample.size_px,
        num_inference_steps=config.sample.num_inference_steps,
        guidance_scale=config.sample.guidance_scale,
        seed=config.sample.seed,
        num_frames=config.sample.num_frames,
        control_images=config.sample.control_images,
    )
    console = error_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        @contextmanager
        def watch(part: ComponentPlan) -> Iterator[Callable[[int], None]]:
            reading = progress.add_task(f"Reading {part.name}", total=part.source_bytes)
            yield lambda count: progress.advance(reading, count)
            progress.remove_task(reading)

        task = progress.add_task("Denoising", total=None)
        images = generate(
            config.model,
            prompts=prompts,
            settings=settings,
            negative_prompt=config.sample.negative_prompt,
            lora=lora,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            watch=watch,
        )
    return write_images(
        images, prompts, out, settings=settings, source=config.model.source, lora=lora
    )


def sample_overrides(
    *,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | None = None,
    frames: int | None = None,
    controls: Sequence[Path] = (),
) -> list[str]:
    """Write the command's options as overrides, so that they are judged like any other.   size: "1024x768"."""
    settings = {
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "num_frames": frames,
    }
    changes = [f"sample.{key}={value}" for key, value in settings.items() if value is not None]
    if size is not None:
        width, height = parse_size(size)
        changes.append(f"sample.size_px=[{width},{height}]")
    if controls:
        files = ",".join(json.dumps(str(path)) for path in controls)
        changes.append(f"sample.control_images=[{files}]")
    return changes


def parse_size(text: str) -> tuple[int, int]:
    """Read "1024x768" as width and height. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if found is None:
        hint = "Write width x height in pixels, e.g. --size 1024x1024."
        raise ConfigError(
            [Fault("--size", f"{text!r} isn't a size", f"command line: --size {text}", hint=hint)]
        )
    return int(found[1]), int(found[2])
