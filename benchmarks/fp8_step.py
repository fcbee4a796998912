"""A LoRA training step on a frozen Qwen-Image DiT, by how the base is stored: `python benchmarks/fp8_step.py`.

Each way runs in a process of its own; rounds are interleaved, one step of each way at a time, so that a noisy machine
is noisy for all. Printed are medians of per-round ratios to bf16, and of one step: bytes at rest, bytes that autograd
saves for backward beside them, the process's peak above its level after imports (in a process whose malloc keeps
nothing back), the peak of tensors alone, and errors against float32.

    python benchmarks/fp8_step.py [--tokens 256] [--layers 5] [--width 1024] [--rounds 7] [--checkpointing]
                                  [--ways bf16,Octavo] [--python PATH] [--diffsynth CHECKOUT] [--json FILE]

--python: an interpreter that has torchao too; ways whose package is missing are left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
PEAK_RUNS = 3
COLUMNS = {
    "time": "step time / bf16",
    "peak": "peak of the process / bf16",
    "tensors": "peak of tensors / bf16",
    "rest": "at rest / bf16",
    "saved_mb": "saved for backward, MB",
    "output": "output error",
    "output_bf16": "output vs bf16",
    "grad": "LoRA gradient error",
}
FORMATS = {"saved_mb": ".0f", "output": ".4f", "output_bf16": ".4f", "grad": ".4f"}


# ---- the process of one way --------------------------------------------------------------------------------------


def work(settings: dict[str, Any]) -> None:
    """Load one way, then make a step whenever a line comes in; each answer is a line of JSON."""
    import torch

    sys.path.insert(0, str(HERE))
    if settings["diffsynth"]:
        sys.path.insert(0, settings["diffsynth"])
    import fp8_ways
    from diffusers import QwenImageTransformer2DModel  # noqa: F401  imports count as the level, not as the peak

    torch.set_num_threads(settings["threads"])
    level = memory_kb("VmRSS")
    way = settings["way"]
    loaders = {**fp8_ways.WAYS, "float32": fp8_ways.load_float32}
    try:
        module = loaders[way](Path(settings["folder"]))
    except ImportError as error:
        fp8_ways.say(missing=str(error))
        return
    fp8_ways.unsettle_adapter_(module)
    if settings["checkpointing"]:
        # Octavo calls diffusers' own switch too, when the plan says so.
        module.enable_gradient_checkpointing()
    module.train()
    batch = fp8_ways.inputs(settings["tokens"], settings["text_tokens"])
    target = torch.randn(batch["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    run = Step(module, batch, target, exact=way == "float32")
    run()  # warms up
    fp8_ways.say(rest=resting_bytes(module), **run.saved())
    for line in sys.stdin:
        match line.strip():
            case "step":
                start = time.perf_counter()
                run()
                fp8_ways.say(seconds=time.perf_counter() - start)
            case "peak":
                reset_peak()
                run()
                fp8_ways.say(peak_bytes=1024 * (memory_kb("VmHWM") - level))
            case "tensors":
                fp8_ways.say(tensor_bytes=run.tensor_bytes())
            case "errors":
                output = run()
                gradients = {
                    n: p.grad for n, p in sorted(module.named_parameters()) if p.grad is not None
                }
                torch.save({"output": output, "gradients": gradients}, settings["results"])
                fp8_ways.say(done=True)


class Step:
    """Forward, loss and backward of one batch."""

    def __init__(self, module: Any, batch: dict[str, Any], target: Any, *, exact: bool) -> None:
        self.module, self.batch, self.target, self.exact = module, batch, target, exact

    def __call__(self) -> Any:
        """Make a step; returns the output as float32."""
        import torch

        for parameter in self.module.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.exact):
            (output,) = self.module(**self.batch)
        torch.nn.functional.mse_loss(output.float(), self.target).backward()
        return output.detach().float()

    def tensor_bytes(self) -> int:
        """Most bytes of tensors at once during a step, weights included."""
        from framework.runtime.trace import MeasuredBytes

        counter = MeasuredBytes("cpu")
        counter.label(tensors_of(self.module), "weights")
        with counter:
            self()
        return counter.peak_bytes

    def saved(self) -> dict[str, int]:
        """Bytes that autograd keeps for backward, not counting what rests in the module anyway."""
        import torch

        resting = {t.untyped_storage().data_ptr() for t in tensors_of(self.module)}
        kept: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            for part in flat(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in resting:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            (output,) = self.module(**self.batch)
        del output
        return {"saved": sum(kept.values())}


def flat(tensor: Any) -> list[Any]:
    """The plain tensors inside a tensor subclass, or the tensor itself."""
    if type(tensor).__module__.startswith("torchao"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in flat(getattr(tensor, name))]
    return [tensor]


def tensors_of(module: Any) -> list[Any]:
    """Every plain tensor that the module holds."""
    held = [*module.parameters(), *module.buffers()]
    return [
        part for tensor in held for part in flat(tensor.data if hasattr(tensor, "data") else tensor)
    ]


def resting_bytes(module: Any) -> int:
    """Bytes of the frozen weights at rest, by storage."""
    seen = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if "lora_" not in name
        for part in flat(tensor.data)
    }
    return sum(seen.values())


def memory_kb(name: str) -> int:
    """A line of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}: this benchmark needs Linux")


def reset_peak() -> None:
    """Start the process's high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


# ---- the process that drives them --------------------------------------------------------------------------------


class Worker:
    """One way in a process of its own."""

    def __init__(
        self, way: str, options: argparse.Namespace, folder: Path, *, lean: bool = False
    ) -> None:
        """lean: freed blocks go back to the system at once, so that the peak is what is held, not what malloc keeps."""
        self.way = way
        self.results = folder / f"{way.replace(' ', '_')}.pt"
        settings = {
            "way": way,
            "folder": str(folder),
            "results": str(self.results),
            "tokens": options.tokens,
            "text_tokens": options.text_tokens,
            "checkpointing": options.checkpointing,
            "threads": options.threads,
            "diffsynth": options.diffsynth or "",
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        if lean:
            environment |= {
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
                "MALLOC_TOP_PAD_": "0",
                "MALLOC_ARENA_MAX": "1",
            }
        self.process = subprocess.Popen(
            [options.python, str(Path(__file__).resolve()), "--work", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not options.verbose else None,
            text=True,
            env=environment,
        )
        self.about = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.way}: the process ended; run again with --verbose")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def drive(options: argparse.Namespace) -> dict[str, Any]:
    """Run all ways side by side and gather what they measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [options.python, "-c", WRITE, str(HERE), name, str(options.layers), str(options.width)],
            check=True,
        )
        workers = []
        for way in options.ways:
            worker = Worker(way, options, folder)
            if "missing" in worker.about:
                print(f"left out: {way} ({worker.about['missing']})", file=sys.stderr)
                continue
            workers.append(worker)
        times: dict[str, list[float]] = {worker.way: [] for worker in workers}
        for _ in range(options.rounds):
            for worker in workers:
                times[worker.way].append(worker.ask("step")["seconds"])
        peaks, tensors = {}, {}
        for worker in workers:
            lean = Worker(worker.way, options, folder, lean=True)
            peaks[worker.way] = median(lean.ask("peak")["peak_bytes"] for _ in range(PEAK_RUNS))
            tensors[worker.way] = lean.ask("tensors")["tensor_bytes"]
            lean.close()
        truth = Worker("float32", options, folder)
        for worker in [truth, *workers]:
            worker.ask("errors")
            worker.close()
        errors = {w.way: compare(w.results, truth.results, workers[0].results) for w in workers}
    base = workers[0].way
    return {
        worker.way: {
            "time": median(t / b for t, b in zip(times[worker.way], times[base], strict=True)),
            "seconds": median(times[worker.way]),
            "peak": peaks[worker.way] / peaks[base],
            "peak_mb": peaks[worker.way] / 1e6,
            "tensors": tensors[worker.way] / tensors[base],
            "tensors_mb": tensors[worker.way] / 1e6,
            "rest": worker.about["rest"] / workers[0].about["rest"],
            "saved_mb": worker.about["saved"] / 1e6,
            **errors[worker.way],
        }
        for worker in workers
    }


WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fp8_ways
fp8_ways.write_checkpoint(Path(sys.argv[2]), num_layers=int(sys.argv[3]), width=int(sys.argv[4]))
"""


def compare(results: Path, truth: Path, base: Path) -> dict[str, float]:
    """Relative L2 errors of the output and of all LoRA gradients, and of the output against the first way's."""
    import torch

    own, true, first = (torch.load(file) for file in (results, truth, base))
    grads = [
        torch.cat([g.float().flatten() for _, g in sorted(values["gradients"].items())])
        for values in (own, true)
    ]
    return {
        "output": distance(own["output"], true["output"]),
        "output_bf16": distance(own["output"], first["output"]),
        "grad": distance(*grads),
    }


def distance(a: Any, b: Any) -> float:
    """|a - b| / |b|."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def table(results: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown."""
    rows = [
        f"{options.tokens} image tokens, {options.text_tokens} text tokens, {options.layers} blocks of width "
        f"{options.width}{', checkpointing' if options.checkpointing else ''}; {options.rounds} rounds, "
        f"{options.threads} threads",
        "",
        f"| storage | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for way, values in results.items():
        cells = [f"{values[key]:{FORMATS.get(key, '.2f')}}" for key in COLUMNS]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=None)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--diffsynth")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true")
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
        options.ways = [*names, *(["DiffSynth-Studio"] if options.diffsynth else []), "Octavo"]
    results = drive(options)
    print(table(results, options))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
