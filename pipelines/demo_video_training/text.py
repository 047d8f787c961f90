"""Define the demo video model's tokenizer and its text encoder."""

import torch
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dma_diffusers.pipelines.demo_training.text import EOS, PAD, build_tokenizer, number_words
from dma_diffusers.pipelines.demo_video_training.concepts import BACKGROUNDS, CONCEPTS
from dma_diffusers.pipelines.demo_video_training.motions import MOTIONS
from dma_diffusers.pipelines.demo_video_training.prompts import prompt

TEXT_TOKENS = 32
_VOCABULARY = number_words(
    sorted({"a", "an", "background", "on", *CONCEPTS, *BACKGROUNDS, *" ".join(MOTIONS).split()})
)


def video_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, like that of the picture model."""
    return build_tokenizer(TEXT_TOKENS, _VOCABULARY)


def prompt_ids() -> torch.Tensor:
    """Return the token ids of every prompt, int64 ``[concepts, motions, backgrounds, TEXT_TOKENS]``."""
    ids = torch.full((len(CONCEPTS), len(MOTIONS), len(BACKGROUNDS), TEXT_TOKENS), PAD)
    for c, concept in enumerate(CONCEPTS):
        for m, motion in enumerate(MOTIONS):
            for b, background in enumerate(BACKGROUNDS):
                words = prompt(concept, motion, background).split()
                ids[c, m, b, : len(words) + 1] = torch.tensor([*(_VOCABULARY[word] for word in words), EOS])
    return ids


def build_text_encoder() -> UMT5EncoderModel:
    """Build the encoder, which maps ids ``[B, TEXT_TOKENS]`` to ``[B, TEXT_TOKENS, 128]``."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(_VOCABULARY),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=2,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )
