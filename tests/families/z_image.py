"""Builds a tiny Z-Image checkpoint in the published layout, with random weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from tests.checkpoints import VOCABULARY, save_tokenizer
from tests.families.parts import kl_vae, unsettle_

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HIDDEN = 16
# Turbo's; the base model's is 6.
SHIFT = 3.0


def build_checkpoint(folder: Path, *, seed: int = 0, shift: float = SHIFT) -> Path:
    """Write a whole checkpoint of 0.8 MB.   shift: of the scheduler, in which base and Turbo differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit, text_encoder = _transformer(), _text_encoder()
        vae = kl_vae(latent_channels=16, scaling=0.3611, shift=0.1159, quant=False)
    dit.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size=400_000)
    text_encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder", max_shard_size=20_000)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    _save_tokenizer(folder / "tokenizer")
    _save_scheduler(folder / "scheduler", shift)
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _transformer() -> nn.Module:
    """2 layers and 1 refiner of each kind, 2 heads of 16; the time embedding's fixed width is most of it."""
    from diffusers import ZImageTransformer2DModel

    return unsettle_(
        ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=HIDDEN,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[8, 4, 4],
            axes_lens=[1536, 512, 512],
        )
    )


def _text_encoder() -> nn.Module:
    """The whole language model with its tied head, as published: 3 layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return unsettle_(Qwen3ForCausalLM(config))


def _save_tokenizer(folder: Path) -> None:
    """Qwen-Image's, with a chat template."""
    from transformers import Qwen2Tokenizer

    save_tokenizer(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def _save_scheduler(folder: Path, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, use_dynamic_shifting=False, shift=shift
    ).save_pretrained(folder)
