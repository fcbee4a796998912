"""CLIP's parts, which FLUX.1 and SDXL have: a tokenizer and a tiny text model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

CORPUS = ["a red apple", "a blue car", "a cat and a dog, a house with a garden"]


def save_clip_tokenizer(folder: Path, *, pad_token: str | None = None) -> int:
    """Write a CLIP tokenizer as published, vocab.json and merges.txt, and return its number of tokens.

    pad_token: None fills with the end token; SDXL's second tokenizer fills with "!".
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    like = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # "!" has id 0, as published; every byte also ends a word, and the end token has the highest id.
    vocabulary = {piece: index for index, piece in enumerate(["!", *_others(model["vocab"], "!")])}
    for last in (*(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(last, len(vocabulary))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token or "<|endoftext|>",
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def _others(vocabulary: dict[str, int], first: str) -> list[str]:
    return [piece for piece in sorted(vocabulary, key=lambda p: vocabulary[p]) if piece != first]


def clip_text_model(
    *, num_tokens: int, width: int, layers: int, act: str, projects: bool = False
) -> nn.Module:
    """CLIP's text model with two heads; `projects` gives it the projection of the pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=num_tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=2,  # the published mistake, on which the pooled state depends
        pad_token_id=1,
    )
    built: Any = CLIPTextModelWithProjection if projects else CLIPTextModel
    model: nn.Module = built(config)
    return model
