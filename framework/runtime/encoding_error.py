"""Measures what FP8 storage costs in accuracy: of each weight, and of the DiT's output on a seeded input.

The reference is the same module with weights as its files have them. It is never in memory as a whole: while it
computes, each encoded layer reads its weight from the file, uses it and drops it. So the measurement needs the encoded
component and one layer, also where the unencoded one wouldn't fit.

Letters: W weight as in the file, V weight decoded from FP8, x a layer's input, y its output, f the DiT's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from framework.errors import PlanError
from framework.hub import fetch_place
from framework.inventory import StoredTensor
from framework.models import Family, TextConditioning
from framework.models.base import device_of, evaluating
from framework.plan.types import ComponentPlan, TensorGroup, TensorPlan
from framework.runtime.adapters import lora_layers
from framework.runtime.encoding_report import INPUT_PX, SEED, SIGMA, TEXT_TOKENS, LayerError
from framework.runtime.sources import match_files
from framework.runtime.streaming import read_tensors
from framework.storage.fp8 import dequantise, encode_e4m3

NUM_PROBES = 16
"""Random directions that layers' shares are estimated from; each share's own error is about a third of it.

To halve the pocket model's error, 1.8 M weights have to stay in bf16 as 8 or more rank them, and 3.6 M as one does."""
_PROBES_AT_ONCE = 8

Product = Callable[[Tensor], Tensor]


class SourceWeights:
    """The weights of a component's encoded layers as its files have them, read one at a time.

    layers: layer name -> (group, tensor) of each weight that is encoded while loading.
    """

    def __init__(self, part: ComponentPlan) -> None:
        """Raises SourceError for files that can't be used."""
        self.layers = {tensor.layer: (group, tensor) for group, tensor in _encoded(part)}
        self._stored: dict[str, StoredTensor] = {}
        if self.layers:
            sources = match_files(part, fetch_place(part.folder))
            stored = {source.tensor.name: source.stored for source in sources}
            self._stored = {
                layer: stored[tensor.name] for layer, (_, tensor) in self.layers.items()
            }

    @staticmethod
    def has_any(part: ComponentPlan) -> bool:
        """Whether loading the component encodes a weight."""
        return any(True for _ in _encoded(part))

    def read(self, layer: str, device: torch.device) -> Tensor:
        """One weight on `device` in the file's number format."""
        _, values = next(iter(read_tensors([self._stored[layer]])))
        return values.to(device)

    def read_all(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Every weight with its layer's name, in the order of the files; each holds until the next is asked for."""
        layer_of = {stored: layer for layer, stored in self._stored.items()}
        for stored, values in read_tensors(self._stored.values()):
            yield layer_of[stored], values.to(device)

    def weight_error(self, layer: str, weight: Tensor) -> LayerError:
        """Encode a weight as loading does, and compare.   weight: as `read` gives it."""
        group, tensor = self.layers[layer]
        assert group.scaling is not None
        # Apple's GPU knows no FP8, and no float64 to sum squares in.
        weight = weight.cpu() if weight.device.type == "mps" else weight
        try:
            codes, scale = encode_e4m3(weight, group.scaling, group.block_shape)
        except ValueError as error:
            raise PlanError(f"{tensor.source_key}: {error}", where=tensor.file) from error
        decoded = dequantise(codes, scale, torch.float32, group.block_shape)
        return LayerError(
            layer=layer, shape=tensor.shape, weight_error=relative_error(decoded, weight.float())
        )


def _encoded(part: ComponentPlan) -> Iterator[tuple[TensorGroup, TensorPlan]]:
    """What loading encodes; what is FP8 in the file stays as it is."""
    for group in part.groups:
        if group.scaling is not None:
            yield from ((group, t) for t in group.tensors if t.source_dtype != "F8_E4M3")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in L2 norms, summed in float64; 0 where both are zero."""
    difference = torch.linalg.vector_norm(found - expected, dtype=torch.float64).item()
    size = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
    if difference == 0:
        return 0.0
    return float(difference / size) if size else float("inf")


def measure_weights(source: SourceWeights, device: torch.device) -> list[LayerError]:
    """Compare every encoded weight with its source; one weight is in memory at a time."""
    return [source.weight_error(layer, weight) for layer, weight in source.read_all(device)]


@dataclass
class OutputProbe:
    """A loaded DiT, in which encoded layers can be computed from their sources for a while.

    dit: encoded as planned; an adapter on it is passed over.   source: of the same plan.
    Its output is that of the seeded input: Gaussian latents at noise level `SIGMA` and Gaussian text.
    """

    dit: nn.Module
    source: SourceWeights
    family: Family
    errors: dict[str, LayerError] = field(default_factory=dict)
    _reference: Tensor | None = None

    def output(self, *, unencoded: Sequence[str] = ()) -> Tensor:
        """The output (1, C, h, w), float32 on the CPU, with these layers computed from their sources."""
        products = {layer: self._from_source(layer) for layer in unencoded}
        with torch.no_grad(), self._measuring(products):
            return self._predict().cpu()

    def reference(self) -> Tensor:
        """The output with no layer encoded; computed once, noting the error of each weight in `errors` on the way."""
        if self._reference is not None:
            return self._reference
        products = {layer: self._from_source(layer, note=True) for layer in self.source.layers}
        with torch.no_grad(), self._measuring(products):
            self._reference = self._predict().cpu()
        for layer in self.source.layers:
            if layer not in self.errors:  # a layer that takes no part in the output
                weight = self.source.read(layer, device_of(self.dit))
                self.errors[layer] = self.source.weight_error(layer, weight)
        return self._reference

    def shares(self) -> dict[str, float]:
        """Each encoded layer's share in the squared error of the output, as far as layers err independently.

        The share is that of |J d|^2, with J the derivative of f by y and d = V x - W x; as an estimate from
        `NUM_PROBES` Gaussian directions v it is the mean of <J^T v, d>^2 (Hutchinson 1990). Shares add up to 1.
        A forward and a backward pass for each 8 of them, over a batch of copies of the input; blocks are computed again
        in the backward pass, to save memory.
        """
        contributions = dict.fromkeys(self.source.layers, 0.0)
        products = {layer: self._attributed(layer, contributions) for layer in contributions}
        generator = torch.Generator("cpu").manual_seed(SEED + 100)
        for start in range(0, NUM_PROBES, _PROBES_AT_ONCE):
            copies = min(_PROBES_AT_ONCE, NUM_PROBES - start)
            with torch.enable_grad(), _checkpointing(self.dit), self._measuring(products):
                output = self._predict(copies=copies)
                directions = torch.randn(output.shape, generator=generator)
                torch.autograd.backward(output, directions.to(output.device))
        whole = sum(contributions.values())
        return {layer: part / whole if whole else 0.0 for layer, part in contributions.items()}

    def _predict(self, *, copies: int = 1) -> Tensor:
        noisy, text = seeded_input(self.family, self.dit, copies=copies)
        sigma = torch.full((copies,), SIGMA)
        return self.family.predict(noisy, sigma, text, self.dit).float()

    @contextmanager
    def _measuring(self, products: Mapping[str, Product]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(evaluating([self.dit]))
            stack.enter_context(_without_adapters(self.dit))
            for layer, product in products.items():
                stack.enter_context(_forward_replaced(self._layer(layer), product))
            yield

    def _layer(self, name: str) -> nn.Module:
        """The layer itself, where an adapter has taken its place."""
        layer = self.dit.get_submodule(name)
        base: Any = getattr(layer, "base_layer", layer)
        assert isinstance(base, nn.Module)
        return base

    def _from_source(self, name: str, *, note: bool = False) -> Product:
        layer = self._layer(name)

        def product(x: Tensor) -> Tensor:
            weight = self.source.read(name, x.device)
            if note and name not in self.errors:
                self.errors[name] = self.source.weight_error(name, weight)
            return plain_product(layer, weight, x)

        return product

    def _attributed(self, name: str, contributions: dict[str, float]) -> Product:
        encoded: Product = self._layer(name).forward
        from_source = self._from_source(name)
        # Gives the output a gradient although nothing that leads to it needs one.
        anchor = torch.zeros((), requires_grad=True)

        def note(x: Tensor, y: Tensor, grad_y: Tensor) -> None:
            change = y.float() - from_source(x).float()
            by_direction = (grad_y.float() * change).flatten(1).sum(1)
            contributions[name] += float(by_direction.square().sum())

        def product(x: Tensor) -> Tensor:
            apply: Any = _Attributed.apply
            y: Tensor = apply(x, anchor, encoded, note)
            return y

        return product


class _Attributed(torch.autograd.Function):
    """An encoded layer that tells, when its gradient passes, what its encoding did to the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        encoded: Product,
        note: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.encoded, ctx.note = encoded, note
        return encoded(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        inner = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            y = ctx.encoded(inner)
        ctx.note(x, y.detach(), grad_y)
        grad_x = None
        if ctx.needs_input_grad[0]:
            (grad_x,) = torch.autograd.grad(y, inner, grad_y)
        return grad_x, None, None, None


def seeded_input(
    family: Family, dit: nn.Module, *, copies: int = 1
) -> tuple[Tensor, TextConditioning]:
    """Latents (B, C, h, w) at noise level 0.5 and a text (B, 64, D) of Gaussian numbers; the same on every device.

    copies: B; all are equal.
    """
    divisor = family.spec.size_divisor_px
    side = max(divisor, INPUT_PX // divisor * divisor)
    x0, noise = (family.initial_latents(side, side, seed) for seed in (SEED, SEED + 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 2)
        text = family.blank_text(TEXT_TOKENS, dit, device=torch.device("cpu"))
    latents = (1 - SIGMA) * x0 + SIGMA * noise
    if copies == 1:
        return latents, text
    return torch.cat([latents] * copies), TextConditioning.collate([text] * copies)


def plain_product(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What a linear, convolution or embedding layer computes with this weight and its own bias.

    weight: any float dtype, cast to x's (of an embedding, to `weight_dtype`).
    Raises PlanError for other layers, and for those that do more than their kind does.
    """
    if isinstance(layer, nn.Embedding):
        target: Any = getattr(layer, "weight_dtype", weight.dtype)
        return functional.embedding(x, weight.to(target))
    weight = weight.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, layer.bias)
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        convolved: Tensor = layer._conv_forward(x, weight, layer.bias)
        return convolved
    raise PlanError(
        f"the error of a {type(layer).__name__} can't be measured",
        hint="name the layer in fp8.keep_high_precision",
    )


@contextmanager
def _forward_replaced(layer: nn.Module, product: Product) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.__dict__["forward"] = product
    try:
        yield
    finally:
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before


@contextmanager
def _checkpointing(module: nn.Module) -> Iterator[None]:
    """Recompute blocks in the backward pass for a while, where the model can."""
    target: Any = module
    switchable = hasattr(target, "enable_gradient_checkpointing")
    if not switchable or target.gradient_checkpointing:
        yield
        return
    target.enable_gradient_checkpointing()
    try:
        yield
    finally:
        target.disable_gradient_checkpointing()


@contextmanager
def _without_adapters(module: nn.Module) -> Iterator[None]:
    """Let peft's layers compute their base alone for a while.

    peft's own switch would change which parameters train.
    """
    layers: list[Any] = [layer for _, layer in lora_layers(module)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state
