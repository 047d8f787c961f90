"""Where each model family has its text, and how its attention modules are called."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from dma_diffusers import grids


@dataclass(frozen=True)
class Family:
    """What one family of transformers does with its tokens.

    text: where text stands in joint attention, "first" or "last"; "none" where text is only attended to by
        cross-attention.
    single_stream: modules called without `encoder_hidden_states` get text and image as one sequence.
    cross_attention: last parts of the names of modules that do cross-attention.
    masks_text: whether the model masks no keys of joint attention but text.
    timestep_scale: timestep of pure noise; None if not known.
    grid: finds what the tokens other than text lie on; None if not known.
    grid_on_device: whether finding it waits for the device.
    """

    text: str
    single_stream: bool = False
    cross_attention: tuple[str, ...] = ()
    masks_text: bool = False
    timestep_scale: float | None = None
    grid: grids.Finder | None = None
    grid_on_device: bool = False

    def role_left_to_stock(self, module: str) -> str:
        """Why the module of this name is left to stock; empty if it is not."""
        if "refiner" in module:
            return "token refiner"
        return "cross-attention" if module.endswith(self.cross_attention) else ""

    def text_range(self, keys: int, hidden: int, encoder: int, model: int | None) -> tuple[int, int] | None:
        """The text tokens (start, stop) of a self- or joint-attention call, (0, 0) if it has none.

        keys: tokens in the call's sequence. hidden, encoder: tokens of the `hidden_states` and
        `encoder_hidden_states` that the module was given, encoder 0 for none. model: tokens of text that the
        model was given. None if this cannot be told: cross-attention, or a model that was given no text.
        """
        if encoder:
            if self.text == "none" or keys != hidden + encoder:
                return None
            length = encoder
        elif self.text == "none" or not self.single_stream:
            length = 0
        elif model is None or model > keys:
            return None
        else:
            length = model
        start = 0 if self.text == "first" or not length else keys - length
        return start, start + length


_FLUX = Family("first", single_stream=True, timestep_scale=1, grid=grids.of_positions, grid_on_device=True)
_CROSS = Family("none", cross_attention=("attn2",), timestep_scale=1000)

FAMILIES = {
    "ChromaTransformer2DModel": _FLUX,
    "CogVideoXTransformer3DModel": Family("first", timestep_scale=1000, grid=grids.of_frames),
    "Flux2Transformer2DModel": _FLUX,
    "FluxTransformer2DModel": _FLUX,
    "HunyuanVideoTransformer3DModel": Family(
        "last", masks_text=True, timestep_scale=1000, grid=grids.of_video
    ),
    "LTXVideoTransformer3DModel": replace(_CROSS, grid=grids.of_lengths),
    "QwenImageTransformer2DModel": Family("first", masks_text=True, timestep_scale=1, grid=grids.of_shapes),
    "SD3Transformer2DModel": Family("last", timestep_scale=1000, grid=grids.of_image),
    "WanTransformer3DModel": replace(_CROSS, grid=grids.of_video),
}


def family_of(model: torch.nn.Module, text: str | None = None, grid: grids.Grid | None = None) -> Family:
    """The family of `model`, with `text` and `grid` in place of what is known about it if given.

    Modules of an unknown family that are called without `encoder_hidden_states` are taken to get text and
    image as one sequence: where that is wrong, a few tiles too many are HIGH.
    Raises ValueError for an unknown family without `text`.
    """
    known = next((FAMILIES[base.__name__] for base in type(model).__mro__ if base.__name__ in FAMILIES), None)
    if known is None and text is None:
        raise ValueError(
            f"{type(model).__name__} is of no known family ({', '.join(FAMILIES)}): "
            'say where its joint attention has text, with text="first", "last" or "none"'
        )
    family = known or Family(text, single_stream=True)
    found = replace(family, grid=partial(grids.given, grid), grid_on_device=False) if grid else family
    return replace(found, text=text or family.text)
