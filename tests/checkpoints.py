"""Builds tiny Qwen-Image checkpoints in the published layout, with random weights, for tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 341
HIDDEN = 16
LATENT_CHANNELS = 16

SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def build_checkpoint(folder: Path, *, seed: int = 0, shard_bytes: int = 60_000) -> Path:
    """Write a whole checkpoint: transformer and text encoder in shards with an index, VAE in one file."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        save_transformer(folder / "transformer", shard_bytes=shard_bytes)
        save_text_encoder(folder / "text_encoder", shard_bytes=shard_bytes)
        save_vae(folder / "vae")
    finally:
        torch.random.set_rng_state(torch_state)
    save_tokenizer(folder / "tokenizer")
    save_scheduler(folder / "scheduler")
    index = {
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def save_transformer(folder: Path, *, shard_bytes: int = 60_000) -> None:
    """2 layers, 3 heads of 16; 0.24 MB in bf16."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(8, 4, 4),
    )
    _unsettle_(model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_bytes)


def save_text_encoder(folder: Path, *, shard_bytes: int = 60_000) -> None:
    """The whole vision-language model, as published: 2 text layers, 2 vision blocks, an output head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e6,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=6,
        video_token_id=7,
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _unsettle_(model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_bytes)


def save_vae(folder: Path) -> None:
    """The image autoencoder with 8 base channels and 8-fold reduction, latents scaled off centre."""
    from diffusers import AutoencoderKLQwenImage

    model = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[(i - 7.5) / 10 for i in range(LATENT_CHANNELS)],
        latents_std=[0.5 + i / 10 for i in range(LATENT_CHANNELS)],
    )
    _unsettle_(model)
    model.to(torch.bfloat16).save_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 341 tokens, special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial",
        "relationships of the objects and background: system user assistant",
        "a red apple, a smiling face, a blue car, a house with a garden, a cat and a dog",
    )
    tokenizer.train_from_iterator(corpus, trainer)
    Qwen2Tokenizer(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    ).save_pretrained(folder)


def save_scheduler(folder: Path) -> None:
    """The published flow-matching scheduler: shift depends on the number of image tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder)


def rename_keys(folder: Path, pattern: str, replacement: str) -> None:
    """Rewrite the keys of every shard and of the index, to get the layout of another library version."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {re.sub(pattern, replacement, k): v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {
            re.sub(pattern, replacement, k): v for k, v in index["weight_map"].items()
        }
        file.write_text(json.dumps(index))


def _unsettle_(model: torch.nn.Module) -> None:
    """Move norms and biases off 1 and 0, so that a test sees it when one isn't loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
