"""Write the pocket model before any training: a tiny Qwen-Image in the published on-disk layout, weights from a seed.

    python assets/pocket/init.py --out outputs/pocket_init --vae outputs/pocket_vae

The tokenizer and the configurations are final; transformer/ and text_encoder/ hold the random start of the recipe
`pocket_base`. The VAE is trained on its own beforehand (train_vae.py) and copied in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers import __version__ as diffusers_version
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from framework.data.openmoji import read_emojis

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)  # QwenImagePipeline.prompt_template_encode; the pipeline drops the tokens before {}
TEMPLATE_START_TOKENS = 34  # QwenImagePipeline.prompt_template_encode_start_idx

# As in Qwen2.5-VL, in its order, after the byte-pair vocabulary.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
EXTRA_WORDS = (
    "a an the of with and or on in emoji icon picture drawing line sketch style small big two three "
    "red orange yellow green blue purple pink brown black white grey"
)

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 1,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [0],
}


def main() -> None:
    """Write the untrained pipeline folder."""
    args = parse_arguments()
    if args.out.exists():
        sys.exit(
            f"{args.out}: exists already; trained weights are never overwritten. Next: name a new folder."
        )
    if not (args.vae / "config.json").is_file():
        sys.exit(f"{args.vae}: no VAE there. Next: make one with assets/pocket/train_vae.py.")
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    transformer = build_transformer()
    args.out.mkdir(parents=True)
    tokenizer.save_pretrained(args.out / "tokenizer")
    text_encoder.save_pretrained(args.out / "text_encoder")
    transformer.save_pretrained(args.out / "transformer")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(args.out / "scheduler")
    (args.out / "model_index.json").write_text(json.dumps(build_model_index(), indent=2) + "\n")
    shutil.copytree(args.vae, args.out / "vae")
    report(args.out, {"transformer": transformer, "text_encoder": text_encoder})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder; refused if it exists")
    parser.add_argument(
        "--vae",
        type=Path,
        default=Path(__file__).with_name("vae"),
        help="trained VAE folder to copy in; default: the one beside this script",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_tokenizer() -> Qwen2Tokenizer:
    """Learn byte-level BPE on which the prompt template and every caption word are whole tokens.

    Each word is seen at the start of a prompt and after a space, as Qwen's pre-tokenizer tells these apart.
    """
    words = set(EXTRA_WORDS.split())
    for emoji in read_emojis("pocket"):
        words.update(emoji.caption.replace("-", " ").split())
    template_text = TEMPLATE.replace("<|im_start|>", "").replace("<|im_end|>", "")
    corpus = [template_text, *(form for word in sorted(words) for form in (word, f" {word}"))]

    bare = Tokenizer(BPE())
    bare.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bare.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1
            << 14,  # more than enough for each word to become one token; the corpus decides
            min_frequency=1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learnt = json.loads(bare.to_str())["model"]
    vocab = {
        **learnt["vocab"],
        **{token: len(learnt["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)},
    }
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )

    start = tokenizer(TEMPLATE.partition("{}")[0])["input_ids"]
    assert len(start) == TEMPLATE_START_TOKENS, f"the template starts with {len(start)} tokens"
    split = [
        form
        for word in words
        for form in (word, f" {word}")
        if len(tokenizer(form)["input_ids"]) != 1
    ]
    assert not split, f"words that are not one token: {split}"
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Build the text encoder (bfloat16) with transformers' own initialisation: normal, std 0.02."""
    token_id = tokenizer.convert_tokens_to_ids
    vocab_size = -(-len(tokenizer) // 64) * 64
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": vocab_size,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config=VISION,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)


@torch.no_grad()
def build_transformer() -> QwenImageTransformer2DModel:
    """Build the DiT (bfloat16) with adaLN-Zero: each block starts as the identity and the output as zero.

    Source: Peebles & Xie 2023, arXiv:2212.09748, section 3.2 and its published code.
    """
    transformer = QwenImageTransformer2DModel(**TRANSFORMER)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedder = transformer.time_text_embed.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    modulations = [
        mod[1] for block in transformer.transformer_blocks for mod in (block.img_mod, block.txt_mod)
    ]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
    return transformer.to(torch.bfloat16)


def build_model_index() -> dict[str, str | list[str]]:
    """Name each component's library and class, as diffusers' from_pretrained reads them."""
    return {
        "_class_name": QwenImagePipeline.__name__,
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }


def report(out: Path, modules: dict[str, nn.Module]) -> None:
    """Print parameter counts and what the weight files weigh."""
    for name, module in modules.items():
        print(
            f"{name}: {sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"
        )
    weights_bytes = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {weights_bytes / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
