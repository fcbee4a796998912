"""What ComfyUI does with a LoRA's keys, restated: which native weight each name means, and which rows of it.

Facts from comfy/lora.py (`model_lora_keys_unet`, `load_lora`), comfy/utils.py (`flux_to_diffusers`,
`z_image_to_diffusers`, `unet_to_diffusers`) and comfy/weight_adapter/lora.py. Native names are counted up here the way
the models are built, not looked up in what is tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Names that ComfyUI accepts before a native name, dotted or with underscores, for every model.
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))


class ComfyNames:
    """The key map of one model."""

    def __init__(self, family: str, module: nn.Module, rules: object) -> None:
        del rules  # what is tested must not be its own measure
        self._shapes = {
            name: tuple(layer.weight.shape)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
        }
        self._module: Any = module
        pairs = {
            "flux": _flux, "z_image": _z_image, "wan2_1": _wan, "wan2_2": _wan, "sdxl": _sdxl,
        }.get(family, _same)  # fmt: skip
        # Layer of diffusers -> (native weight, first row, whether halves are exchanged).
        self._places: dict[str, tuple[str, int, bool]] = {
            ours: (native, first, swapped)
            for ours, native, first, swapped in pairs(self._shapes, module)
            if ours in self._shapes
        }
        self._natives: dict[str, tuple[int, ...]] = {}
        for ours, (native, first, _) in self._places.items():
            rows, *rest = self._shapes[ours]
            before = self._natives.get(native, (0,))[0]
            self._natives[native] = (max(before, first + rows), *rest)
        self._keys = self._key_map(family)

    def _key_map(self, family: str) -> dict[str, tuple[str, int, int, bool]]:
        """Name in a file -> native weight, first row, number of rows, whether halves are exchanged."""
        keys: dict[str, tuple[str, int, int, bool]] = {}
        for native, shape in self._natives.items():
            whole = (native, 0, shape[0], False)
            keys[f"diffusion_model.{native}"] = whole
            keys[f"lora_unet_{native.replace('.', '_')}"] = whole
        by_diffusers = {
            "flux": ("transformer.", ""),
            "z_image": ("diffusion_model.", "transformer.", ""),
            "qwen_image": ("transformer.", ""),
            "qwen_image_edit": ("transformer.", ""),
        }.get(family, ())
        for ours, (native, first, swapped) in self._places.items():
            for prefix in by_diffusers:
                keys[f"{prefix}{ours}"] = (native, first, self._shapes[ours][0], swapped)
        return keys

    def deltas(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native weight -> what is added to it; fails for a key that means nothing, or doesn't fit."""
        found: dict[str, Tensor] = {}
        stems = {stem for key in tensors if (stem := _stem(key)) is not None}
        left = set(tensors)
        for stem in stems:
            native, first, rows, swapped = self._keys[stem]
            down, up = next(
                (tensors[f"{stem}.{a}"], tensors[f"{stem}.{b}"])
                for a, b in _PAIRS
                if f"{stem}.{a}" in tensors
            )
            alpha = tensors.get(f"{stem}.alpha")
            strength = 1.0 if alpha is None else float(alpha) / down.shape[0]
            delta = strength * (up.flatten(1) @ down.flatten(1))
            shape = self._natives[native]
            delta = delta.reshape(rows, *shape[1:])  # ComfyUI reshapes to the weight's own shape
            if swapped:
                delta = torch.cat(list(reversed(delta.chunk(2))))
            whole = found.setdefault(native, torch.zeros(shape))
            whole.narrow(0, first, rows).add_(delta)
            left -= {k for k in left if _stem(k) == stem or k == f"{stem}.alpha"}
        assert not left, f"ComfyUI doesn't load {sorted(left)[:3]}"
        return found

    def wanted(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same from layers under diffusers' names."""
        found: dict[str, Tensor] = {}
        for ours, delta in deltas.items():
            native, first, swapped = self._places[ours]
            if swapped:
                delta = torch.cat(list(reversed(delta.chunk(2))))
            whole = found.setdefault(native, torch.zeros(self._natives[native]))
            whole.narrow(0, first, delta.shape[0]).add_(delta)
        return found


def _stem(key: str) -> str | None:
    ending = next((e for pair in _PAIRS for e in pair if key.endswith(f".{e}")), None)
    return None if ending is None else key.removesuffix(f".{ending}")


Places = Iterator[tuple[str, str, int, bool]]


def _same(shapes: Mapping[str, tuple[int, ...]], module: Any) -> Places:
    for name in shapes:
        yield name, name, 0, False


def _flux(shapes: Mapping[str, tuple[int, ...]], module: Any) -> Places:
    width = module.inner_dim
    for number in range(len(module.transformer_blocks)):
        ours, native = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for index, part in enumerate("qkv"):
            yield f"{ours}.attn.to_{part}", f"{native}.img_attn.qkv", index * width, False
            yield f"{ours}.attn.add_{part}_proj", f"{native}.txt_attn.qkv", index * width, False
        for one, other in (
            ("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj"),
            ("ff.net.0.proj", "img_mlp.0"), ("ff.net.2", "img_mlp.2"),
            ("ff_context.net.0.proj", "txt_mlp.0"), ("ff_context.net.2", "txt_mlp.2"),
            ("norm1.linear", "img_mod.lin"), ("norm1_context.linear", "txt_mod.lin"),
        ):  # fmt: skip
            yield f"{ours}.{one}", f"{native}.{other}", 0, False
    for number in range(len(module.single_transformer_blocks)):
        ours, native = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        for index, part in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            yield f"{ours}.{part}", f"{native}.linear1", index * width, False
        yield f"{ours}.proj_out", f"{native}.linear2", 0, False
        yield f"{ours}.norm.linear", f"{native}.modulation.lin", 0, False
    yield "proj_out", "final_layer.linear", 0, False
    yield "norm_out.linear", "final_layer.adaLN_modulation.1", 0, True
    yield "x_embedder", "img_in", 0, False
    yield "context_embedder", "txt_in", 0, False


def _z_image(shapes: Mapping[str, tuple[int, ...]], module: Any) -> Places:
    for name in shapes:
        stem, _, leaf = name.rpartition(".attention.")
        if leaf in ("to_q", "to_k", "to_v"):
            width = shapes[name][0]
            yield name, f"{stem}.attention.qkv", ("to_q", "to_k", "to_v").index(leaf) * width, False
        elif leaf == "to_out.0":
            yield name, f"{stem}.attention.out", 0, False
        else:
            native = name.replace("all_x_embedder.2-1", "x_embedder")
            yield name, native.replace("all_final_layer.2-1", "final_layer"), 0, False


def _wan(shapes: Mapping[str, tuple[int, ...]], module: Any) -> Places:
    for number in range(len(module.blocks)):
        block = f"blocks.{number}"
        for ours, native in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for leaf, other in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                yield f"{block}.{ours}.{leaf}", f"{block}.{native}.{other}", 0, False
        yield f"{block}.ffn.net.0.proj", f"{block}.ffn.0", 0, False
        yield f"{block}.ffn.net.2", f"{block}.ffn.2", 0, False


def _sdxl(shapes: Mapping[str, tuple[int, ...]], module: Any) -> Places:
    """Blocks are counted as the UNet of LDM appends them."""
    levels, layers = len(module.down_blocks), module.config.layers_per_block
    yield "conv_in", "input_blocks.0.0", 0, False
    number = 1
    for level in range(levels):
        for layer in range(layers):
            yield from _pair(shapes, f"down_blocks.{level}", layer, f"input_blocks.{number}")
            number += 1
        if level < levels - 1:
            ours = f"down_blocks.{level}.downsamplers.0.conv"
            yield ours, f"input_blocks.{number}.0.op", 0, False
            number += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _attention(shapes, "mid_block.attentions.0", "middle_block.1")
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for level in range(levels):
        for layer in range(layers + 1):
            block = f"output_blocks.{number}"
            yield from _pair(shapes, f"up_blocks.{level}", layer, block)
            if layer == layers and level < levels - 1:
                yield f"up_blocks.{level}.upsamplers.0.conv", f"{block}.2.conv", 0, False
            number += 1
    for ours, native in (
        ("conv_out", "out.2"),
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ):  # fmt: skip
        yield ours, native, 0, False


def _pair(shapes: Mapping[str, tuple[int, ...]], ours: str, layer: int, native: str) -> Places:
    yield from _resnet(f"{ours}.resnets.{layer}", f"{native}.0")
    yield from _attention(shapes, f"{ours}.attentions.{layer}", f"{native}.1")


def _resnet(ours: str, native: str) -> Places:
    for one, other in (
        ("conv1", "in_layers.2"), ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
    ):  # fmt: skip
        yield f"{ours}.{one}", f"{native}.{other}", 0, False


def _attention(shapes: Mapping[str, tuple[int, ...]], ours: str, native: str) -> Places:
    for name in shapes:
        if name.startswith(f"{ours}."):
            yield name, f"{native}.{name.removeprefix(f'{ours}.')}", 0, False
