"""A LoRA on an FP8 base: what autograd keeps, gradients against the bf16 base, adapters, DoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from framework.models import get_family
from framework.models.base import TextConditioning
from framework.plan.build import build_plan
from framework.plan.types import LoraLayer, LoraPlan
from framework.runtime.adapters import attach_lora_, is_adapter_name
from framework.runtime.load import adapter_parameters, load_component, resting_bytes
from framework.schema import ModelConfig
from framework.storage.managed import convert_layer_, is_managed

WIDTH = 64


class Block(nn.Module):
    """Attention-like arithmetic: the products that a transformer block has, with a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_v = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + torch.tanh(self.to_q(h)) * self.to_v(h)
        return x + self.down(functional.gelu(self.up(x)))


class Model(nn.Module):
    """Two blocks, optionally recomputed in the backward pass."""

    def __init__(self, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def make_model(
    *,
    precision: str,
    scaling: str = "row",
    lora: bool = True,
    dora: bool = False,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Model:
    """The same random model every time, frozen, its linear layers in FP8 or not, with a rank-4 adapter."""
    torch.manual_seed(0)
    model = Model(checkpointing=checkpointing)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.to(dtype).requires_grad_(False)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if precision == "fp8":
        for _, module in layers:
            convert_layer_(module, scaling=scaling)
    if lora:
        plan = LoraPlan(
            rank=4,
            alpha=8,
            dropout=0.0,
            use_rslora=False,
            use_dora=dora,
            init_from=None,
            layers=tuple(
                LoraLayer(name=n, kind="linear", shape=(m.out_features, m.in_features))
                for n, m in layers
            ),
        )
        attach_lora_(model, plan, component="dit", seed=3, trains=True)
    return model


def stir_adapters_(model: nn.Module) -> None:
    """Move B off zero, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def batch(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 9, WIDTH, generator=generator).to(dtype)


def step(model: nn.Module, *, autocast: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients of the adapters, gradient of the input."""
    x = batch().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    loss = y.float().square().mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return loss.detach(), grads, x.grad


def saved_weight_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of float tensors with the shape of a base weight (or its transpose) that autograd packs away.

    Parameters themselves (of layers that stay in bf16) cost nothing and don't count.
    """
    shapes = set()
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for module in model.modules():
        if (
            isinstance(module, nn.Linear)
            and module.weight.shape[0] > 4
            and module.weight.shape[1] > 4
        ):
            shapes |= {tuple(module.weight.shape), tuple(module.weight.shape[::-1])}
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        own = tensor.untyped_storage().data_ptr() in owned
        if tensor.is_floating_point() and tuple(tensor.shape) in shapes and not own:
            saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run().float().square().mean().backward()
    return saved


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
def test_no_upcast_weight_among_saved_tensors(
    lora: bool, checkpointing: bool, autocast: bool
) -> None:
    model = make_model(precision="fp8", lora=lora, checkpointing=checkpointing)

    def run() -> Tensor:
        x = batch().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(x)

    assert saved_weight_bytes(model, run) == 0


def test_the_detector_sees_a_layer_that_casts_in_forward() -> None:
    """The usual way of storing weights in FP8 fails the test above."""

    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight.to(x.dtype), None)

    layer = Casting(WIDTH, WIDTH, bias=False).requires_grad_(False)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    kept = saved_weight_bytes(layer, lambda: layer(batch().requires_grad_()))
    assert kept == 2 * WIDTH * WIDTH


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_one_decoded_weight_is_alive(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are written into the same memory, which is as large as the largest of them."""
    from framework.storage import products, scratch

    scratch.release_scratch()
    memory: set[int] = set()
    decoded_count = 0
    original = products._prepare

    def prepare(source: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        nonlocal decoded_count
        weight, scale = original(source, dtype)
        memory.add(weight.untyped_storage().data_ptr())
        decoded_count += 1
        return weight, scale

    monkeypatch.setattr(products, "_prepare", prepare)
    model = make_model(precision="fp8", checkpointing=checkpointing)
    for _ in range(2):  # the first pass finds out how large the largest is
        memory.clear()
        model(batch().requires_grad_()).float().square().mean().backward()
    assert len(memory) == 1
    assert decoded_count > 10
    (buffer,) = [b for kind, b in scratch._buffers.by_kind.items() if kind[0] == "weight"]
    largest = max(layer.weight_shape.numel() for layer in model.modules() if is_managed(layer))
    assert buffer.numel() == largest
    scratch.release_scratch()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("scaling", "bound"), [("row", 0.06), ("tensor", 0.06), ("none", 0.08)])
def test_gradients_against_the_bf16_base(scaling: str, bound: float, autocast: bool) -> None:
    """Relative L2 distance from the bf16 base's gradients after two blocks; one layer alone is below .04."""
    results = {}
    for precision in ("bf16", "fp8"):
        model = make_model(precision=precision, scaling=scaling)
        stir_adapters_(model)
        results[precision] = step(model, autocast=autocast)
    (_, grads, x_grad), (_, wanted, wanted_x) = results["fp8"], results["bf16"]
    assert grads.keys() == wanted.keys()
    assert all(is_adapter_name(name) for name in grads)

    def distance(part: str) -> float:
        a = torch.cat([g.flatten() for n, g in grads.items() if part in n])
        b = torch.cat([g.flatten() for n, g in wanted.items() if part in n])
        return float((a - b).norm() / b.norm())

    assert 0 < distance("lora_A") < bound
    assert 0 < distance("lora_B") < bound
    assert float((x_grad.float() - wanted_x.float()).norm() / wanted_x.float().norm()) < bound


def test_gradients_are_those_of_the_decoded_base() -> None:
    """With the codes' own values as a float32 base nothing but rounding is left."""
    managed = make_model(precision="fp8", lora=False, dtype=torch.float32)
    plain = make_model(precision="bf16", lora=False, dtype=torch.float32)
    for layer, source in zip(plain.modules(), managed.modules(), strict=True):
        if is_managed(source):
            layer.weight.data = source.weight
    x, y = batch(torch.float32).requires_grad_(), batch(torch.float32).requires_grad_()
    managed(x).square().mean().backward()
    plain(y).square().mean().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)


def test_checkpointing_gives_the_same_gradients() -> None:
    runs = []
    for checkpointing in (False, True):
        model = make_model(precision="fp8", checkpointing=checkpointing)
        stir_adapters_(model)
        runs.append(step(model, autocast=True))
    for name, grad in runs[0][1].items():
        assert torch.equal(grad, runs[1][1][name])


def test_adapters_are_float32_and_the_same_on_every_base() -> None:
    start = torch.random.get_rng_state()
    models = [make_model(precision=p, dora=d) for p in ("fp8", "bf16") for d in (False, True)]
    torch.random.set_rng_state(start)
    reference = adapter_parameters(models[1])
    for model in models:
        own = adapter_parameters(model)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in own.values())
        for name, parameter in own.items():
            if "magnitude" not in name:
                assert torch.equal(parameter, reference[name])
        frozen = [
            n for n, p in model.named_parameters() if not is_adapter_name(n) and p.requires_grad
        ]
        assert not frozen


def test_adapter_start_does_not_depend_on_other_layers_or_touch_the_random_state() -> None:
    model = make_model(precision="fp8")
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    single = Model().to(torch.bfloat16)
    layer = LoraLayer(name="blocks.1.up", kind="linear", shape=(4 * WIDTH, WIDTH))
    plan = LoraPlan(
        rank=4,
        alpha=8,
        dropout=0,
        use_rslora=False,
        use_dora=False,
        init_from=None,
        layers=(layer,),
    )
    torch.random.set_rng_state(before)
    attach_lora_(single, plan, component="dit", seed=3, trains=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "blocks.1.up.lora_A.default.weight"
    assert torch.equal(single.get_parameter(name), model.get_parameter(name))
    assert len(adapter_parameters(single)) == 2


def test_peft_never_meets_float8() -> None:
    model = make_model(precision="fp8", dora=True)
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.dtype in (torch.bfloat16, torch.float32, torch.uint8)


def test_dora_on_fp8_equals_dora_on_the_decoded_bf16_base() -> None:
    managed = make_model(precision="fp8", lora=False)
    decoded = make_model(precision="bf16", lora=False)
    for layer, source in zip(decoded.modules(), managed.modules(), strict=True):
        if is_managed(source):
            layer.weight.data = source.weight
    layers = tuple(
        LoraLayer(name=n, kind="linear", shape=(m.out_features, m.in_features))
        for n, m in decoded.named_modules()
        if isinstance(m, nn.Linear)
    )
    plan = LoraPlan(
        rank=4, alpha=8, dropout=0, use_rslora=True, use_dora=True, init_from=None, layers=layers
    )
    results = []
    for model in (managed, decoded):
        attach_lora_(model, plan, component="dit", seed=3, trains=True)
        stir_adapters_(model)
        results.append(step(model, autocast=False))
    for name, grad in results[0][1].items():
        wanted = results[1][1][name]
        assert float((grad - wanted).norm() / wanted.norm()) < 0.02, name
    managed_adapters, decoded_adapters = adapter_parameters(managed), adapter_parameters(decoded)
    for name, parameter in managed_adapters.items():
        assert torch.equal(parameter, decoded_adapters[name]), name


def test_moving_the_model_with_its_adapter_leaves_codes_alone() -> None:
    model = make_model(precision="fp8")
    codes = {n: b.clone() for n, b in model.named_buffers()}
    at_rest = resting_bytes(model)
    for move in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
        copy.deepcopy,
    ):
        moved = move(model)
        for name, buffer in moved.named_buffers():
            assert buffer.dtype == codes[name].dtype
            assert torch.equal(buffer, codes[name])
    assert resting_bytes(model) == at_rest


def load_published_dit(source: Path, precision: str, *, checkpointing: bool) -> nn.Module:
    """The tiny checkpoint's transformer with an adapter that isn't zero any more."""
    config = ModelConfig.model_validate(
        {
            "family": "qwen_image",
            "source": str(source),
            "dit": {"precision": precision, "trainable": "lora", "lora": {"rank": 2}},
        }
    )
    plan = build_plan(
        config, purpose="train", phases=("train",), resident={"train": ("dit",)}, device="cpu"
    )
    dit = load_component(
        plan.component("dit"),
        get_family("qwen_image"),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        seed=4,
    )
    stir_adapters_(dit)
    if checkpointing:
        dit.enable_gradient_checkpointing()
    return dit


def predict(dit: nn.Module) -> Tensor:
    """The family's prediction for fixed latents, noise levels and text."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 16, 8, 8, generator=generator)
    embeds = torch.randn(2, 5, 16, generator=generator).bfloat16()
    text = TextConditioning(embeds, torch.ones(2, 5, dtype=torch.bool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return get_family("qwen_image").predict(noisy, torch.tensor([0.3, 0.8]), text, dit)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_published_transformer_class_in_fp8(tiny_checkpoint: Path, checkpointing: bool) -> None:
    """The real model: measured .008 for the output and .04 for the gradient, and no upcast weight kept."""
    outputs, grads = [], []
    for precision in ("fp8", "bf16"):
        dit = load_published_dit(tiny_checkpoint, precision, checkpointing=checkpointing)
        with torch.no_grad():
            outputs.append(predict(dit))
        if precision == "fp8":
            assert saved_weight_bytes(dit, lambda dit=dit: predict(dit)) == 0
        else:
            predict(dit).float().square().mean().backward()
        adapters = adapter_parameters(dit)
        grads.append(torch.cat([p.grad.flatten() for p in adapters.values() if p.grad is not None]))
        # The last block's text output is used by nobody, so one adapter of it gets no gradient.
        assert len(grads[-1]) == sum(p.numel() for p in adapters.values()) - 2 * 96
    for (got, wanted), bound in ((outputs, 0.02), (grads, 0.08)):
        assert 0 < float((got - wanted).norm() / wanted.norm()) < bound


def test_attaching_a_lora_decodes_nothing_and_a_dora_only_for_the_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from framework.storage import weights

    decoded: list[int] = []
    original = weights.dequantise
    monkeypatch.setattr(
        weights,
        "dequantise",
        lambda codes, *rest, **options: (
            decoded.append(codes.numel()),
            original(codes, *rest, **options),
        )[1],
    )
    make_model(precision="fp8")
    assert decoded == []
    make_model(precision="fp8", dora=True)
    assert len(decoded) == 2 * 8  # peft asks twice for the norm
