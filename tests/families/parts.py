"""Tiny parts that several families' checkpoints have."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures, dB."""
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def unsettle_(model: nn.Module) -> nn.Module:
    """Move norms, biases and pad tokens off 1 and 0, so that a test sees it when one isn't loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def kl_vae(*, latent_channels: int, scaling: float, shift: float | None, quant: bool) -> nn.Module:
    """AutoencoderKL of four blocks with 8 channels, 8-fold reduction.   quant: with the two quantising convolutions."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        force_upcast=True,
    )
    return unsettle_(vae)


def t5_tokenizer() -> Any:
    """A unigram tokenizer of about 75 tokens that ends each text with `</s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    alphabet = "abcdefghijklmnopqrstuvwxyz▁,.!?0123456789'-ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list(alphabet),
    )
    corpus = ["a red apple", "a blue car", "a cat and a dog, a house with a garden"]
    tokenizer.train_from_iterator(4 * corpus, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    return T5Tokenizer(
        vocab=[(piece, score) for piece, score in vocabulary], extra_ids=0, model_max_length=512
    )
