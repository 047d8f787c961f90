"""Where each model family has its text, and how its attention modules are called."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Family:
    """What one family of transformers does with its tokens.

    text: where text stands in joint attention, "first" or "last"; "none" where text is only attended to by
        cross-attention.
    single_stream: modules called without `encoder_hidden_states` get text and image as one sequence.
    cross_attention: last parts of the names of modules that do cross-attention.
    timestep_scale: timestep of pure noise; None if not known.
    """

    text: str
    single_stream: bool = False
    cross_attention: tuple[str, ...] = ()
    timestep_scale: float | None = None

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


FAMILIES = {
    "ChromaTransformer2DModel": Family("first", single_stream=True, timestep_scale=1),
    "CogVideoXTransformer3DModel": Family("first", timestep_scale=1000),
    "Flux2Transformer2DModel": Family("first", single_stream=True, timestep_scale=1),
    "FluxTransformer2DModel": Family("first", single_stream=True, timestep_scale=1),
    "HunyuanVideoTransformer3DModel": Family("last", timestep_scale=1000),
    "LTXVideoTransformer3DModel": Family("none", cross_attention=("attn2",), timestep_scale=1000),
    "QwenImageTransformer2DModel": Family("first", timestep_scale=1),
    "SD3Transformer2DModel": Family("last", timestep_scale=1000),
    "WanTransformer3DModel": Family("none", cross_attention=("attn2",), timestep_scale=1000),
}


def family_of(model: torch.nn.Module, text: str | None = None) -> Family:
    """The family of `model`, with `text` in place of what is known about it if given.

    Modules of an unknown family that are called without `encoder_hidden_states` are taken to get text and
    image as one sequence: where that is wrong, a few tiles too many are HIGH.
    Raises ValueError for an unknown family without `text`.
    """
    for base in type(model).__mro__:
        if family := FAMILIES.get(base.__name__):
            return replace(family, text=text or family.text)
    if text is None:
        raise ValueError(
            f"{type(model).__name__} is of no known family ({', '.join(FAMILIES)}): "
            'say where its joint attention has text, with text="first", "last" or "none"'
        )
    return Family(text, single_stream=True)
