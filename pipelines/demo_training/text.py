"""Define the demo model's tokenizer, its two text encoders, and the loss that teaches them to parse prompts."""

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dma_diffusers.pipelines.demo_training.concepts import BACKGROUNDS, TINTS
from dma_diffusers.pipelines.demo_training.scenes import vocabulary

PAD, EOS, UNK = 0, 1, 3  # not 2: a CLIP encoder whose end token has id 2 is treated as a legacy checkpoint
TEXT_TOKENS = 128
POOLED_TOKENS = 77
_LONGEST_PROMPT = 32  # no training prompt has more tokens
_SPECIALS = ("<pad>", "</s>", "<reserved>", "<unk>")


def number_words(words: list[str]) -> dict[str, int]:
    """Map the special tokens and `words` to token ids."""
    return {word: i for i, word in enumerate([*_SPECIALS, *words])}


_VOCABULARY = number_words(vocabulary())


def word_ids(words: list[str]) -> list[int]:
    """Return the token ids of lower-case words, without the end token."""
    return [_VOCABULARY.get(word, UNK) for word in words]


def build_tokenizer(max_length: int, vocabulary: dict[str, int] = _VOCABULARY) -> PreTrainedTokenizerFast:
    """Build a tokenizer that has one token per word and ends with ``</s>``.

    It ignores case and punctuation, and turns unknown words into ``<unk>``.
    """
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9\s]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_t5() -> T5EncoderModel:
    """Build the token encoder, which maps ids ``[B, TEXT_TOKENS]`` to ``[B, TEXT_TOKENS, 160]``."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_VOCABULARY),
            d_model=160,
            d_kv=32,
            num_heads=5,
            d_ff=320,
            num_layers=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )


def build_clip() -> CLIPTextModel:
    """Build the pooled encoder, which maps ids ``[B, POOLED_TOKENS]`` to ``[B, 128]``, read at the end token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_VOCABULARY),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POOLED_TOKENS,
            hidden_act="gelu",
            pad_token_id=PAD,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )


class TextEncoders(nn.Module):
    """Both encoders, with heads that parse the prompt; the heads' loss gives word order its meaning.

    The heads read each mention's place and tint from its token, and the background from the pooled vector. They exist
    in training only.
    """

    def __init__(self):
        super().__init__()
        self.t5 = build_t5()
        self.clip = build_clip()
        self.place = nn.Linear(self.t5.config.d_model, 3)
        self.tint = nn.Linear(self.t5.config.d_model, len(TINTS) + 1)
        self.background = nn.Linear(self.clip.config.hidden_size, len(BACKGROUNDS))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode int64 ids ``[B, TEXT_TOKENS]`` as tokens ``[B, TEXT_TOKENS, 160]`` and pooled vectors ``[B, 128]``."""
        tokens = self.t5(ids).last_hidden_state
        # The pooled encoder is causal and is read at the end token, so padding after it has no effect.
        pooled = self.clip(ids[:, :_LONGEST_PROMPT]).pooler_output
        return tokens, pooled

    def parse_loss(self, tokens, pooled, scenes, weight: torch.Tensor) -> torch.Tensor:
        """Return the error of the scene that the heads read; ``weight`` ``[B]`` is 0 where the prompt was dropped."""
        mentioned = (scenes.word >= 0).float() * weight[:, None]
        index = scenes.word.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[-1])
        words = tokens.gather(1, index).float()
        place = F.smooth_l1_loss(self.place(words), scenes.word_place, beta=0.05, reduction="none").sum(-1)
        tint = F.cross_entropy(self.tint(words).transpose(1, 2), scenes.word_tint + 1, reduction="none")
        background = F.cross_entropy(self.background(pooled.float()), scenes.background, reduction="none")
        return (mentioned * (place + 0.2 * tint)).mean() + 0.2 * (weight * background).mean()
