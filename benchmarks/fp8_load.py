"""Loading a bf16 checkpoint into FP8, by how it is stored: `python benchmarks/fp8_load.py`.

Each load is a fresh process; rounds are interleaved. Printed are medians: seconds, as a multiple of reading the file's
bytes in the same round, and the peak of the process's memory above its level after imports, as a multiple of the floor:
the bytes that rest afterwards plus the largest tensor of the file. "anonymous" leaves out pages of mapped files, which
the system can take back; "resident" counts them.

"Octavo: second load" reads the file that the first load with `model.converted_dir` leaves; its time and floor are
multiples of reading that file and of what it holds.

    python benchmarks/fp8_load.py [--layers 5] [--width 1024] [--rounds 5] [--python PATH] [--diffsynth CHECKOUT]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from fp8_step import WRITE, memory_kb, reset_peak, resting_bytes  # noqa: E402

READING = "reading the bytes"
SECOND = "Octavo: second load"
CONVERTED = "converted"
POLL_SECONDS = 0.001


def work(settings: dict[str, Any]) -> None:
    """Load one way and say what it took."""
    import torch

    torch.set_num_threads(settings["threads"])
    if settings["diffsynth"]:
        sys.path.insert(0, settings["diffsynth"])
    folder = Path(settings["folder"])
    files = sorted((folder / settings["inside"]).glob("*.safetensors"))
    if settings["way"] == READING:
        start = time.perf_counter()
        read_all(files)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
        return
    import fp8_ways
    from diffusers import QwenImageTransformer2DModel  # noqa: F401  imports count as the level, not as the peak

    fp8_ways.WAYS[SECOND] = load_second
    read_all(files)  # into the system's cache, for every way alike
    try:
        warm_up(fp8_ways, settings["way"])
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    level, anonymous = memory_kb("VmRSS"), memory_kb("RssAnon")
    reset_peak()
    watch = Watch()
    start = time.perf_counter()
    module = fp8_ways.WAYS[settings["way"]](folder)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "anonymous": 1024 * (watch.stop() - anonymous),
                "resident": 1024 * (memory_kb("VmHWM") - level),
                "rest": resting_bytes(module) + adapter_bytes(module),
            }
        ),
        flush=True,
    )


def adapter_bytes(module: Any) -> int:
    """Bytes of the LoRA, which every way gives to the model alike."""
    return sum(p.numel() * p.element_size() for n, p in module.named_parameters() if "lora_" in n)


def load_second(folder: Path) -> Any:
    """Octavo's load from its own file, which is written first if it isn't there."""
    import fp8_ways
    import torch

    from framework.models import get_family
    from framework.runtime.load import load_component

    part = fp8_ways.octavo_plan(folder).component("dit")
    return load_component(
        part.model_copy(update={"converted_dir": str(folder / CONVERTED)}),
        get_family("qwen_image"),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
    )


def warm_up(fp8_ways: Any, way: str) -> None:
    """Load a tiny checkpoint first, so that late imports count neither as time nor as memory."""
    with tempfile.TemporaryDirectory() as name:
        fp8_ways.write_checkpoint(Path(name), num_layers=1, width=128)
        fp8_ways.WAYS[way](Path(name))


def read_all(files: list[Path]) -> None:
    """Read every byte into one buffer that is used again."""
    buffer = bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class Watch:
    """Follows the process's anonymous memory, of which the system keeps no high-water mark."""

    def __init__(self) -> None:
        self._most = 0
        self._going = True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while self._going:
            self._most = max(self._most, memory_kb("RssAnon"))
            time.sleep(POLL_SECONDS)

    def stop(self) -> int:
        """Most that was held, in kB."""
        self._most = max(self._most, memory_kb("RssAnon"))
        self._going = False
        self._thread.join()
        return self._most


def load(
    way: str, folder: Path, options: argparse.Namespace, *, inside: str = "transformer"
) -> dict[str, Any]:
    """Load in a fresh process.   inside: folder of the files that are read."""
    settings = {
        "way": way,
        "inside": inside,
        "folder": str(folder),
        "threads": options.threads,
        "diffsynth": options.diffsynth or "",
    }
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(options.threads),
    }
    process = subprocess.run(
        [options.python, str(Path(__file__).resolve()), "--work", json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{way}: {process.stderr}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def drive(options: argparse.Namespace) -> dict[str, Any]:
    """Load every way in every round and gather the medians."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [options.python, "-c", WRITE, str(HERE), name, str(options.layers), str(options.width)],
            check=True,
        )
        if SECOND in options.ways:
            load(SECOND, folder, options)
        for _ in range(options.rounds):
            for way in list(options.ways):
                inside = CONVERTED if way == SECOND else "transformer"
                # Just before, so that both have the machine as busy.
                reading = load(READING, folder, options, inside=inside)["seconds"]
                answer = load(way, folder, options, inside=inside)
                if "missing" in answer:
                    print(f"left out: {way} ({answer['missing']})", file=sys.stderr)
                    options.ways.remove(way)
                    continue
                floor = answer["rest"] + largest_tensor_bytes(folder / inside)
                rounds.setdefault(way, []).append(
                    {
                        "seconds": answer["seconds"],
                        "times_reading": answer["seconds"] / reading,
                        "anonymous": answer["anonymous"] / floor,
                        "resident": answer["resident"] / floor,
                        "floor_mb": floor / 1e6,
                    }
                )
    return {
        way: {key: median(r[key] for r in measured) for key in measured[0]}
        for way, measured in rounds.items()
    }


def largest_tensor_bytes(folder: Path) -> int:
    """Of a component's files."""
    from framework.inventory import read_inventory

    return max(tensor.num_bytes for tensor in read_inventory(folder).values())


def table(results: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown."""
    rows = [
        f"{options.layers} blocks of width {options.width}; {options.rounds} rounds, {options.threads} threads",
        "",
        "| storage | seconds | / reading the bytes | peak / floor, anonymous | resident | floor, MB |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {way} | {v['seconds']:.2f} | {v['times_reading']:.1f} | {v['anonymous']:.2f} | {v['resident']:.2f} "
        f"| {v['floor_mb']:.0f} |"
        for way, v in results.items()
    ]
    return "\n".join(rows)


def main() -> None:
    """Parse the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=None)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--diffsynth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    if options.ways is None:
        names = [
            "bf16",
            "diffusers layerwise casting",
            "torchao Float8WeightOnly",
            "plain cast in forward",
        ]
        options.ways = [
            *names,
            *(["DiffSynth-Studio"] if options.diffsynth else []),
            "Octavo",
            SECOND,
        ]
    results = drive(options)
    print(table(results, options))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
