"""Tiny models of sound."""

import torch
from diffusers.models import transformers

from tests.dma_diffusers.tiny_case import TEXT, Case, without_zeros

LENGTH = 150


def ace_step() -> Case:
    """One of its two layers attends in sliding windows, by an additive mask."""
    model = transformers.AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=16,
    )  # fmt: skip
    inputs = dict(timestep_r=torch.full((1,), 0.5), context_latents=torch.randn(1, 2 * LENGTH, 16))
    latents = torch.randn(1, 2 * LENGTH, 8)
    return Case(model, (0, 0), (), latents, inputs, 0, image_calls=1, prompt_width=32, length=LENGTH)


def longcat_audio() -> Case:
    """The text reaches all tokens through their norms."""
    model = transformers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=8, text_conv=False
    )
    inputs = dict(
        encoder_attention_mask=torch.ones(1, TEXT, dtype=torch.bool),
        attention_mask=torch.ones(1, LENGTH, dtype=torch.bool),
    )
    latents = torch.randn(1, LENGTH, 8)
    return Case(
        without_zeros(model), (0, 0), (), latents, inputs, 0, image_calls=2, prompt=(0, LENGTH), prompt_width=8,
        length=LENGTH,
    )  # fmt: skip


def music3() -> Case:
    """The text is added to the sound, token by token; the timestep stands before them."""
    model = transformers.MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=8, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=32,
        rotary_dim=4, fourier_embedding_dim=8,
    )  # fmt: skip
    return Case(
        model, (0, 0), (), torch.randn(1, 8, LENGTH), {}, 0, image_calls=2, prompt=(1, 1 + LENGTH),
        prompt_tokens=LENGTH, prompt_width=8, length=1 + LENGTH,
    )  # fmt: skip


def depth_decoder() -> Case:
    model = transformers.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=32, audio_vocab_size=16
    )
    return Case(
        model, (0, 0), (), torch.randn(1, 9, 32), {}, 0, image_calls=2, draw=lambda: None,
        names=("inputs_embeds", None, None), length=9,
    )  # fmt: skip


def stable_audio() -> Case:
    """A token of global conditions stands before the others."""
    model = transformers.StableAudioDiTModel(
        in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_attention_heads=1,
        out_channels=8, cross_attention_dim=8, time_proj_dim=16, global_states_input_dim=6, cross_attention_input_dim=8,
    )  # fmt: skip
    rotary = torch.ones(LENGTH + 1, 8), torch.zeros(LENGTH + 1, 8)
    inputs = dict(global_hidden_states=torch.randn(1, 1, 6), rotary_embedding=rotary)
    latents = torch.randn(1, 8, LENGTH)
    return Case(model, (0, 0), (), latents, inputs, 0, image_calls=2, prompt_width=8, length=LENGTH + 1)


def stable_audio3(text: int = TEXT) -> Case:
    """Three tokens that it learned stand before the others."""
    model = transformers.StableAudio3DiTModel(
        io_channels=8, patch_size=1, embed_dim=32, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=6,
        local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
        use_differential_attention=False,
    )  # fmt: skip
    inputs = dict(global_hidden_states=torch.randn(1, 6))
    latents = torch.randn(1, 8, LENGTH)
    return Case(
        model,
        (0, 0),
        (),
        latents,
        inputs,
        0,
        image_calls=2,
        prompt_tokens=text,
        prompt_width=8,
        length=LENGTH + 3,
    )


CASES = {
    "ace_step": ace_step,
    "depth_decoder": depth_decoder,
    "longcat_audio": longcat_audio,
    "music3": music3,
    "stable_audio": stable_audio,
    "stable_audio3": stable_audio3,
    "stable_audio3, as much text as sound": lambda: stable_audio3(text=LENGTH + 3),
}
