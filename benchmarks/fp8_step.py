"""A LoRA training step on a frozen Qwen-Image DiT, by how the base is stored: `python benchmarks/fp8_step.py`.

Each way runs in a process of its own; rounds are interleaved, one step of each way at a time, so that a noisy machine
is noisy for all. Printed are medians of per-round ratios to bf16, and of one step: bytes at rest, bytes that autograd
saves for backward beside them, the process's peak above its level after imports (in a process whose malloc keeps
nothing back), the peak of tensors alone, and errors against float32.

    python benchmarks/fp8_step.py [--cases 256,256+checkpointing,1024] [--layers 9] [--width 1024] [--rounds 5]
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
    # Weights that rest in mapped pages of the file would count the whole file as the process's memory.
    module._apply(lambda tensor: tensor.clone())
    fp8_ways.unsettle_adapter_(module)
    module.train()
    runs = [
        Step(module, case, settings["text_tokens"], exact=way == "float32")
        for case in settings["cases"]
    ]
    fp8_ways.say(rest=resting_bytes(module))
    for line in sys.stdin:
        what, number = line.split()
        run = runs[int(number)]
        run.prepare()
        match what:
            case "step":
                start = time.perf_counter()
                run()
                fp8_ways.say(seconds=time.perf_counter() - start)
            case "saved":
                run()  # warms up
                fp8_ways.say(**run.saved())
            case "peak":
                run()
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

    def __init__(self, module: Any, case: str, text_tokens: int, *, exact: bool) -> None:
        """case: image tokens, and "+checkpointing" if blocks are recomputed, e.g. "256+checkpointing"."""
        import fp8_ways
        import torch

        tokens, _, extra = case.partition("+")
        self.module, self.exact, self.checkpointing = module, exact, bool(extra)
        self.batch = fp8_ways.inputs(int(tokens), text_tokens)
        shape = self.batch["hidden_states"].shape
        self.target = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def prepare(self) -> None:
        """Switch checkpointing as the case says, by diffusers' own switch, which Octavo uses too."""
        if self.checkpointing:
            self.module.enable_gradient_checkpointing()
        else:
            self.module.disable_gradient_checkpointing()

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
            "cases": options.cases,
            "text_tokens": options.text_tokens,
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

    def ask(self, what: str, case: int) -> dict[str, Any]:
        """Send a command about one of the cases and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {case}\n")
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
        measured: dict[str, dict[str, dict[str, float]]] = {case: {} for case in options.cases}
        for number, case in enumerate(options.cases):
            measured[case] = measure_times(workers, number, options.rounds)
        for worker in workers:
            lean = Worker(worker.way, options, folder, lean=True)
            for number, case in enumerate(options.cases):
                measured[case][worker.way] |= lean.ask("peak", number) | lean.ask("tensors", number)
            lean.close()
        truth = Worker("float32", options, folder)
        for worker in [truth, *workers]:
            worker.ask("errors", 0)
            worker.close()
        for worker in workers:
            errors = compare(worker.results, truth.results, workers[0].results)
            measured[options.cases[0]][worker.way] |= errors
    return {case: against_first(values) for case, values in measured.items()}


def measure_times(workers: list[Worker], case: int, rounds: int) -> dict[str, dict[str, float]]:
    """Way -> bytes at rest and saved, and the median of each round's ratio to the first way."""
    saved = {worker.way: worker.ask("saved", case) for worker in workers}
    times: dict[str, list[float]] = {worker.way: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            times[worker.way].append(worker.ask("step", case)["seconds"])
    base = times[workers[0].way]
    return {
        worker.way: {
            "time": median(t / b for t, b in zip(times[worker.way], base, strict=True)),
            "seconds": median(times[worker.way]),
            "rest_bytes": worker.about["rest"],
            "saved_mb": saved[worker.way]["saved"] / 1e6,
        }
        for worker in workers
    }


def against_first(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add the ratios of bytes to those of the first way."""
    first = next(iter(values.values()))
    ratios = {"peak": "peak_bytes", "tensors": "tensor_bytes", "rest": "rest_bytes"}
    return {
        way: {**own, **{name: own[key] / first[key] for name, key in ratios.items()}}
        for way, own in values.items()
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
        f"{options.text_tokens} text tokens, {options.layers} blocks of width {options.width}; "
        f"{options.rounds} rounds, {options.threads} threads"
    ]
    for case, ways in results.items():
        columns = {key: title for key, title in COLUMNS.items() if key in next(iter(ways.values()))}
        rows += ["", f"{case} image tokens", "", f"| storage | {' | '.join(columns.values())} |"]
        rows.append("|---" * (len(columns) + 1) + "|")
        for way, values in ways.items():
            cells = [f"{values[key]:{FORMATS.get(key, '.2f')}}" for key in columns]
            rows.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work")
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=["256", "256+checkpointing", "1024"]
    )
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
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
