"""What only a CUDA device can show of offloading: pinned memory, copies on their own stream, allocator peaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.models import TextConditioning, get_family
from framework.plan.build import build_plan
from framework.plan.types import ComponentPlan
from framework.plan.units import component_units
from framework.runtime.load import load_component
from framework.schema import ModelConfig
from framework.storage.fetching import Fetcher, Parcel, Unit
from framework.storage.stores import Slot, fill_slot, host_stores
from framework.storage.weights import StoredWeight

pytestmark = pytest.mark.gpu

FAMILY = get_family("qwen_image")
WIDTH = 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of 6 blocks and 1024 channels, large enough that copies and products overlap."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=6,
        attention_head_dim=128,
        num_attention_heads=WIDTH // 128,
        joint_attention_dim=512,
    ).to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def part_of(folder: Path, converted: Path, **settings: Any) -> ComponentPlan:
    model = ModelConfig.model_validate(
        {
            "family": "qwen_image",
            "source": str(folder),
            "converted_dir": str(converted),
            "dit": {"trainable": "lora", **settings},
        }
    )
    plan = build_plan(
        model, purpose="train", phases=("train",), resident={"train": ("dit",)}, device="cuda"
    )
    return plan.component("dit")


def train_step(dit: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Three steps, so that the order is known; the last one's loss and gradients."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, 16, 32, 32, generator=generator).cuda()
    text = TextConditioning(
        torch.randn(1, 24, 512, generator=generator), torch.ones(1, 24, dtype=torch.bool)
    ).to("cuda")
    sigma = torch.tensor([0.4], device="cuda")
    for name, parameter in dit.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.01)
    for _ in range(3):
        dit.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            velocity = FAMILY.predict(noisy, sigma, text, dit)
        loss = velocity.square().mean()
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in dit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("granularity", ["model", "block", "layer"])
@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_copies_beside_the_arithmetic_change_nothing(
    checkpoint: Path, tmp_path: Path, precision: str, offload: str, granularity: str
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    for place in ("none", offload):
        part = part_of(
            checkpoint, tmp_path, precision=precision, offload=place, granularity=granularity
        )
        fetcher = Fetcher(device)
        dit = load_component(
            part, FAMILY, device=device, compute_dtype=torch.bfloat16, fetcher=fetcher
        )
        results.append(train_step(dit))
        fetcher.close()
    (loss, gradients), (found_loss, found) = results
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(found[name], value) for name, value in gradients.items())


def test_an_offloaded_step_stays_below_what_rests_on_the_device(
    checkpoint: Path, tmp_path: Path
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    peaks = {}
    for offload in ("none", "host"):
        part = part_of(checkpoint, tmp_path, offload=offload)
        fetcher = Fetcher(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        dit = load_component(
            part, FAMILY, device=device, compute_dtype=torch.bfloat16, fetcher=fetcher
        )
        torch.cuda.reset_peak_memory_stats(device)
        train_step(dit)
        peaks[offload] = torch.cuda.max_memory_allocated(device) - before
        fetcher.close()
        del dit
    part = part_of(checkpoint, tmp_path, offload="host")
    sizes = sorted(unit.num_bytes for unit in component_units(part))
    # Instead of all weights, two units at most.
    saved = sum(sizes) - sum(sizes[-2:])
    assert peaks["host"] <= peaks["none"] - 0.95 * saved


def test_the_limit_holds_and_room_is_used(checkpoint: Path, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    part = part_of(checkpoint, tmp_path, offload="host", granularity="layer")
    total = sum(unit.num_bytes for unit in component_units(part))
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_allocated(device) + total
    fetcher = Fetcher(device, limit_bytes=limit)
    fetcher.keep(total)  # more than there is room for beside the activations
    dit = load_component(part, FAMILY, device=device, compute_dtype=torch.bfloat16, fetcher=fetcher)
    torch.cuda.reset_peak_memory_stats(device)
    train_step(dit)
    largest = max(unit.num_bytes for unit in component_units(part))
    assert fetcher.held_bytes > 3 * largest
    # Room is made when a unit is fetched; what one layer computes before the next fetch comes on top.
    assert torch.cuda.max_memory_allocated(device) <= limit + 2 * largest
    fetcher.close()


def test_host_memory_is_pinned_without_rounding_up() -> None:
    first, second = host_stores([3 * 2**20 + 256, 512], pinned=True)
    assert first.buffer.is_pinned()
    assert second.buffer.is_pinned()
    assert first.buffer.untyped_storage().nbytes() == 3 * 2**20 + 256 + 512
    target = torch.empty(512, dtype=torch.uint8, device="cuda")
    second.buffer.fill_(7)
    second.copy_to(target)
    torch.cuda.synchronize()
    assert target.unique().tolist() == [7]


def test_memory_isnt_reused_before_its_last_reader_is_done() -> None:
    """Many units through little memory, with products in between that are slower than copies."""
    device = torch.device("cuda", torch.cuda.current_device())
    slot = Slot(shape=(512, 512), dtype=torch.float32, offset=0)
    units = []
    for index, store in enumerate(host_stores([2**20] * 24, pinned=True)):
        fill_slot(store, slot, StoredWeight(torch.full((512, 512), float(index))))
        units.append(Unit(str(index), "dit", [Parcel(store, {"layer": slot})], ahead=True))
    fetcher = Fetcher(device)
    x = torch.full((8192, 512), 1 / 512, device=device)
    for _ in range(3):
        sums = []
        for unit in units:
            y = x
            for _ in range(4):  # the mean of equal numbers, times each unit's own
                y = x @ fetcher.fetch(unit)["layer"].values
            sums.append(y[0, 0])
        assert torch.stack(sums).tolist() == pytest.approx(list(range(24)), rel=1e-3)
    fetcher.close()
