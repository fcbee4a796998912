"""One way to hold a frozen DiT under a LoRA, in a process of its own; offload.py and gpu.py put several side by side.

The process loads the way, warms up, and then answers lines from its standard input with lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WARM_UPS = 2

DEFAULTS: dict[str, Any] = {
    "precision": "fp8",
    "offload": "none",
    "granularity": "layer",
    "keep": 0.0,
    "fused": False,
    "checkpointing": False,
    "text_tokens": 32,
    "cold": False,
}
"""What a way may set.   keep: share of the weights that move which stays on the device once fetched.   cold: files are
dropped from the system's cache before each step."""


class Way:
    """The driving side: starts the process and asks it.

    about: `resting_bytes` in the module, on the device; `moving_bytes` of weights that rest elsewhere, `fetched_bytes`
    of them in a step, `held_bytes` at most on the device; `loading_seconds`. Or `missing`: why it can't run here.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        # Freed blocks go back to the system at once, so that the peak is what is held, not what malloc keeps.
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": str(settings["threads"]),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "one_step.py"), json.dumps({**DEFAULTS, **settings})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        """Send "step" or "peak"; the answer has `seconds` or `peak_bytes`."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name}: the process ended; what it said is above")


def write_checkpoint(folder: Path, *, layers: int, width: int) -> None:
    """Write the DiT that all ways load, in another process, so that this one stays small."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import fp8_ways; "
        "fp8_ways.write_checkpoint(Path(sys.argv[2]), num_layers=int(sys.argv[3]), width=int(sys.argv[4]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(HERE), str(folder), str(layers), str(width)], check=True
    )


# ---- the process of one way --------------------------------------------------------------------------------------


def main() -> None:
    """Load, warm up, answer."""
    settings = json.loads(sys.argv[1])
    import torch

    sys.path.insert(0, str(HERE))
    import fp8_ways
    from diffusers import QwenImageTransformer2DModel  # noqa: F401  imports count as the level, not as the peak
    from fp8_step import memory_kb

    from framework.storage.triton_product import is_available, use_fused

    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    if settings["fused"] and not is_available(device):
        fp8_ways.say(missing="the fused kernel needs an NVIDIA card of capability 8.0 and triton")
        return
    if device.type == "cuda":
        torch.cuda.init()
    level = memory_kb("VmRSS")
    began = time.perf_counter()
    module, fetcher, moving = load(settings, device)
    loading = time.perf_counter() - began
    step = Step(module, settings, device)
    files = [str(path) for path in Path(settings["folder"]).rglob("*.safetensors")]
    with use_fused(settings["fused"]):
        for _ in range(WARM_UPS):
            step()
        before = fetcher.fetched_bytes
        step()
        fp8_ways.say(
            resting_bytes=resting_bytes(module),
            moving_bytes=moving,
            fetched_bytes=fetcher.fetched_bytes - before,
            held_bytes=fetcher.held_at_most,
            loading_seconds=loading,
        )
        for line in sys.stdin:
            if settings["cold"]:
                drop_from_cache(files)
            match line.strip():
                case "step":
                    fp8_ways.say(seconds=step.seconds())
                case "peak":
                    fp8_ways.say(peak_bytes=peak_bytes(step, device, level))


def load(settings: dict[str, Any], device: Any) -> tuple[Any, Any, int]:
    """The module as the plan says, what fetches its weights, and how many bytes those are."""
    import fp8_ways
    import torch

    from framework.models import get_family
    from framework.plan.build import build_plan
    from framework.plan.units import component_units
    from framework.runtime.load import load_component
    from framework.schema import ModelConfig
    from framework.storage.fetching import Fetcher

    class WatchedFetcher(Fetcher):
        held_at_most = 0

        def fetch(self, unit: Any) -> Any:
            weights = super().fetch(unit)
            self.held_at_most = max(self.held_at_most, self.held_bytes)
            return weights

    dit = {
        "precision": settings["precision"],
        "trainable": "lora",
        "lora": {"rank": fp8_ways.RANK, "alpha": fp8_ways.RANK},
        "offload": settings["offload"],
    }
    if settings["offload"] != "none":
        dit["granularity"] = settings["granularity"]
    source = Path(settings["folder"])
    values = {"family": "qwen_image", "source": str(source), "dit": dit}
    if settings["offload"] == "disk":
        values["converted_dir"] = str(source / "converted")
    plan = build_plan(
        ModelConfig.model_validate(values),
        purpose="train",
        phases=("train",),
        resident={"train": ("dit",)},
        device=settings["device"],
    ).component("dit")
    fetcher = WatchedFetcher(device)
    moving = sum(p.num_bytes for unit in component_units(plan) for p in unit.parcels)
    fetcher.keep(int(settings["keep"] * moving))
    module = load_component(
        plan,
        get_family("qwen_image"),
        device=device,
        compute_dtype=torch.bfloat16,
        fetcher=fetcher,
    )
    fp8_ways.unsettle_adapter_(module)
    if settings["checkpointing"]:
        module.enable_gradient_checkpointing()
    module.train()
    return module, fetcher, moving


class Step:
    """Forward, loss and backward of one batch."""

    def __init__(self, module: Any, settings: dict[str, Any], device: Any) -> None:
        import fp8_ways
        import torch

        batch = fp8_ways.inputs(settings["tokens"], settings["text_tokens"])
        self.batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        generator = torch.Generator().manual_seed(3)
        shape = self.batch["hidden_states"].shape
        self.target = torch.randn(shape, generator=generator).to(device)
        self.module, self.device = module, device

    def __call__(self) -> None:
        """Make a step; gradients stay where they are until the next one."""
        import torch

        for parameter in self.module.parameters():
            parameter.grad = None
        with torch.autocast(self.device.type, torch.bfloat16):
            (output,) = self.module(**self.batch)
        torch.nn.functional.mse_loss(output.float(), self.target).backward()

    def seconds(self) -> float:
        """Time of a step, the device's work included."""
        self._wait()
        start = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_bytes(step: Step, device: Any, level: int) -> int:
    """Of one step: what CUDA's allocator gave out at most; on the CPU the process's memory above its level."""
    import torch
    from fp8_step import memory_kb, reset_peak

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    reset_peak()
    step()
    return 1024 * (memory_kb("VmHWM") - level)


def resting_bytes(module: Any) -> int:
    """Bytes of the frozen weights that the module itself holds on the device between steps."""
    here = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name, t in [*module.named_parameters(), *module.named_buffers()]
        if "lora_" not in name
    }
    return sum(here.values())


def drop_from_cache(files: list[str]) -> None:
    """Ask the system to forget the files' pages, so that they are read from the disk."""
    for name in files:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
