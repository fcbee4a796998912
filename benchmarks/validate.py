"""How long judging configurations takes, beside `import torch` on the same machine: `python benchmarks/validate.py`.

Three commands run in fresh processes, alternating, and the median of each is printed: one configuration, a product of
100 different ones (both as `octavo validate`), and importing torch. Process time is user plus system time of the whole
process, Python's own start included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VALIDATE = (sys.executable, "-m", "framework.cli", "validate", "recipe=pocket_lora")
HUNDRED = (
    "optim.lr=1e-4,2e-4,3e-4,4e-4,5e-4",
    "model.dit.lora.rank=1,2,4,8,16",
    "model.dit.precision=fp8,bf16",
    "trainer.seed=1,2",
)
COMMANDS: dict[str, Sequence[str]] = {
    "one": VALIDATE,
    "hundred": (*VALIDATE, *HUNDRED),
    "torch": (sys.executable, "-c", "import torch"),
}
TARGETS = {"one": ("process_seconds", 1.0), "hundred": ("wall_seconds", 10.0)}


def measure(command: Sequence[str]) -> dict[str, float]:
    """Run a command once; its wall time and process time in seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": wall, "process_seconds": used}


def compare(repeats: int) -> dict[str, object]:
    """Run every command `repeats` times after one that isn't counted; medians, ratios, and which targets are met."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for count in range(repeats + 1):
        for name, command in COMMANDS.items():
            figures = measure(command)
            if count:  # the first run also fills the disk cache
                runs[name].append(figures)
    medians = {
        name: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0]}
        for name, found in runs.items()
    }
    torch = medians["torch"]["process_seconds"]
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "repeats": repeats,
        **medians,
        "ratio_to_torch": {
            name: round(medians[name]["process_seconds"] / torch, 3) for name in ("one", "hundred")
        },
        "targets_met": {name: medians[name][key] < limit for name, (key, limit) in TARGETS.items()},
    }


def main() -> int:
    """Print a table, or JSON with --json; exit code 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = compare(options.repeats)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{'':<22}{'wall':>9}{'process':>10}{'/ import torch':>16}")
        titles = {
            "one": "1 configuration",
            "hundred": "100 configurations",
            "torch": "import torch",
        }
        for name, title in titles.items():
            figures = found[name]
            ratio = found["ratio_to_torch"].get(name, 1.0)  # type: ignore[attr-defined]
            wall, process = figures["wall_seconds"], figures["process_seconds"]  # type: ignore[index]
            print(f"{title:<22}{wall:>7.2f} s{process:>8.2f} s{ratio:>15.2f}x")
        print(f"Medians of {options.repeats} runs on {os.cpu_count()} cores.")
    return 0 if all(found["targets_met"].values()) else 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
