"""Does a LoRA on an FP8 base learn as well as one on a bf16 base? Trains both with several seeds and writes the answer.

    python benchmarks/fp8_quality.py                      # three seeds each, writes docs/quality.md and its picture
    python benchmarks/fp8_quality.py --seeds 1 --steps 50 --out /tmp/quality

Every run is the shipped command line in a process of its own; all share the cache. The held-out pictures, their noise
levels and their noise are the same for all runs, so that losses can be compared one to one.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from yaml import safe_load

from framework.inference.sheet import sample_sheet, save_png

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("bf16", "fp8")


def main() -> None:
    """Train all runs, then write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per precision")
    parser.add_argument("--steps", type=int, help="optimizer steps; unset means the recipe's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--recipe", default="pocket_lora")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder of quality.md and images/"
    )
    args = parser.parse_args()
    keys = [(p, seed) for seed in range(1, args.seeds + 1) for p in PRECISIONS]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = pool.map(lambda key: train(args.recipe, *key, args.steps), keys)
        runs = dict(zip(keys, folders, strict=True))
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    draw_sheet(runs, args.out / "images" / "fp8_quality.png")
    page = render_page(runs, " ".join(["python", "benchmarks/fp8_quality.py", *sys.argv[1:]]))
    (args.out / "quality.md").write_text(page)
    print(page)


def train(recipe: str, precision: str, seed: int, steps: int | None) -> Path:
    """Train one LoRA by the command line; returns the run's folder."""
    name = f"quality-{precision}-{seed}"
    overrides = [f"recipe={recipe}", f"model.dit.precision={precision}", f"trainer.seed={seed}"]
    overrides += [f"run.name={name}", "checkpoint.resume=never"]
    if steps is not None:
        overrides += [f"trainer.max_steps={steps}", f"validation.every_n_steps={steps}"]
        overrides += [f"optim.warmup_steps={min(20, steps)}"]
    print(f"{name} ...", flush=True)
    subprocess.run(
        [sys.executable, "train.py", *overrides], cwd=ROOT, check=True, stdout=sys.stderr
    )
    return max(path for path in (ROOT / "outputs" / name).iterdir() if path.is_dir())


def read_losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, held-out loss) of a run."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    return [(int(row["step"]), float(row["val/loss"])) for row in rows]


def resting_bytes(run_dir: Path) -> int:
    """Bytes of the stored DiT, as the run's plan counts them."""
    return json.loads((run_dir / "plan.json").read_text())["components"]["dit"]["resting_bytes"]


def draw_sheet(runs: dict[tuple[str, int], Path], path: Path) -> None:
    """One row before training and one per precision after it, same prompts and noise (first seed)."""
    config = (runs["bf16", 1] / "config.yaml").read_text()
    prompts = safe_load(config)["sample"]["prompts"]
    rows = []
    for title, run_dir, first in (
        ("bf16 base, before", runs["bf16", 1], True),
        ("bf16 base, after", runs["bf16", 1], False),
        ("fp8 base, before", runs["fp8", 1], True),
        ("fp8 base, after", runs["fp8", 1], False),
    ):
        folders = sorted((run_dir / "samples").glob("step-*"))
        folder = folders[0] if first else folders[-1]
        rows.append(
            (title, [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))])
        )
    save_png(sample_sheet(rows, prompts), path)


def render_page(runs: dict[tuple[str, int], Path], command: str) -> str:
    """Write the tables as Markdown."""
    seeds = sorted({seed for _, seed in runs})
    losses = {key: read_losses(run_dir) for key, run_dir in runs.items()}
    ratios = [losses["fp8", seed][-1][1] / losses["bf16", seed][-1][1] for seed in seeds]
    gains = {
        key: (found[0][1] - found[-1][1]) / found[0][1]
        for key, found in losses.items()
        if found[0][0] == 0
    }
    table = [
        "| seed | bf16 base: before → after | fp8 base: before → after | fp8 / bf16, after |",
        "|---|---|---|---|",
    ]
    for seed, ratio in zip(seeds, ratios, strict=True):
        cells = [f"{losses[p, seed][0][1]:.5f} → {losses[p, seed][-1][1]:.5f}" for p in PRECISIONS]
        table.append(f"| {seed} | {cells[0]} | {cells[1]} | {ratio:.4f} |")
    spread = [losses["bf16", seed][-1][1] for seed in seeds]
    steps = losses["bf16", seeds[0]][-1][0]
    sizes = {p: resting_bytes(runs[p, seeds[0]]) for p in PRECISIONS}
    fall = {p: statistics.mean(gains[p, seed] for seed in seeds) for p in PRECISIONS}
    return "\n".join(
        [
            "# Measured quality: LoRA on an FP8 base",
            "",
            f"Written by `{command}`.",
            f"Pocket model, recipe `pocket_lora`, {steps} steps, {len(seeds)} seeds each, on a CPU.",
            "Held-out loss: flow matching on the same held-out pictures, noise levels and noise.",
            "",
            *table,
            "",
            f"- Held-out loss on the fp8 base is **{statistics.mean(ratios):.4f}** times that on the bf16 base "
            f"(mean of {len(seeds)} seeds; {min(ratios):.4f} to {max(ratios):.4f}).",
            f"- Seeds alone move the loss on the bf16 base between {min(spread):.5f} and {max(spread):.5f}.",
            f"- Training lowered it by {fall['bf16']:.1%} (bf16 base) and {fall['fp8']:.1%} (fp8 base).",
            f"- The stored DiT takes {sizes['fp8'] / sizes['bf16']:.3f} of its bf16 bytes "
            f"({sizes['fp8']:,} against {sizes['bf16']:,}).",
            "",
            "The same prompts and noise, first seed:",
            "",
            "![samples](images/fp8_quality.png)",
            "",
        ]
    )


if __name__ == "__main__":
    main()
