"""Where each model family has its text, what its tokens lie on, and which neighbourhood was published for it."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from dma_diffusers import grids
from dma_diffusers.kernels.tiling.neighborhood import check_dimensions
from dma_diffusers.kernels.tiling.policies import Neighborhood


@dataclass(frozen=True)
class Published:
    """A neighbourhood that kept a family's pictures as they were, in full precision and without training.

    grid, window, stride: in tokens, as published. source: who published it. Its first steps ran with full attention
        (`Family.dense_first`).
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    source: str

    def policy(self, grid: grids.Grid) -> Neighborhood:
        """The same share of each side of another grid, which nobody has shown anything about, and the same stride.

        Raises ValueError for a grid of other dimensions.
        """
        check_dimensions("the published window", self.window, grid)
        sides = zip(grid, self.window, self.grid, strict=True)
        window = [max(round(length * side / of), 1) for length, side, of in sides]
        return Neighborhood(tuple(window), tuple(map(min, self.stride, window)))


@dataclass(frozen=True)
class DenseFirst:
    """Steps and layers that keep every pair where a family's other calls leave pairs out.

    above_sigma: a noise level (0 to 1) between the last of the dense steps and the step after it, by the schedule of
        those who published their number. layers: attention modules, as in `DMAConfig.dense_layers`; those that a small
        model has not are passed over. source: who published it, and what of it is our own judgement.
    """

    above_sigma: float
    layers: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Family:
    """What one family of transformers does with its tokens.

    text: where text stands in joint attention, "first" or "last"; "none" where text is only attended to by
        cross-attention.
    single_stream: modules called without `encoder_hidden_states` get text and image as one sequence.
    pads_grid: modules get one sequence in which padding stands between the grid's tokens and the text: all that are not
        the grid's count as text. Calls that don't tell their grid are left to stock.
    drops_padding: modules attend to fewer tokens than they were given, without the text's padding.
    cross_attention: last parts of the names of modules that do cross-attention.
    audio: last parts of the names of modules that attend among tokens of sound.
    refiners: parts of the names of modules that see the text alone.
    masks_text: whether the model masks no keys of joint attention but text.
    squares_masks: whether a module masks padding as queries too, whose rows nobody reads: it is then asked to mask keys
        alone, and spared a mask of tokens × tokens.
    timestep: the name of the model's argument. timestep_scale: what it is at pure noise; None if not known.
    timestep_rises: whether it is 0 at pure noise and the scale without noise.
    grid: finds what the tokens other than text lie on; None if not known.
    grid_on_device: whether finding it waits for the device.
    published: a neighbourhood for it; None where none is known of.
    dense_first: what published work keeps dense; None where none is known of, or needed.
    quality_first: the same for those who would rather wait; known where `dense_first` is.
    """

    text: str
    single_stream: bool = False
    pads_grid: bool = False
    drops_padding: bool = False
    cross_attention: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    refiners: tuple[str, ...] = ("refiner",)
    masks_text: bool = False
    squares_masks: bool = False
    timestep: str = "timestep"
    timestep_scale: float | None = None
    timestep_rises: bool = False
    grid: grids.Finder | None = None
    grid_on_device: bool = False
    published: Published | None = None
    dense_first: DenseFirst | None = None
    quality_first: DenseFirst | None = None

    def stock_role(self, module: str) -> str:
        """Why the module of this name is left to stock; empty if it is not."""
        if any(part in module for part in self.refiners):
            return "token refiner"
        if module.endswith(self.audio):
            return "attention among tokens of sound"
        return "cross-attention" if module.endswith(self.cross_attention) else ""

    def text_range(
        self, keys: int, hidden: int, encoder: int, model: int | None, grid: int | None = None
    ) -> tuple[int, int] | None:
        """The text tokens (start, stop) of a self- or joint-attention call, (0, 0) if it has none.

        keys: tokens in the call's sequence. hidden, encoder: tokens of the `hidden_states` and
        `encoder_hidden_states` that the module was given, encoder 0 for none. model: tokens of text that the
        model was given. grid: tokens on the model's grid, if that is known. None if this cannot be told:
        cross-attention, or a model that was given no text or tells no grid.
        """
        if self.text == "none":
            return None if encoder else (0, 0)
        if self.pads_grid:
            length = None if grid is None else keys - grid
        elif encoder:
            length = keys - hidden
            if length > encoder or (length < encoder and not self.drops_padding):
                return None
        else:
            length = model if self.single_stream else 0
        if length is None or not 0 <= length <= keys:
            return None
        start = 0 if self.text == "first" or not length else keys - length
        return start, start + length

    def masked(self, text: tuple[int, int]) -> str:
        """Which keys a mask hides from calls with this text: "text" for none but these, "keys" for any."""
        return "text" if self.masks_text and text[0] < text[1] else "keys"

    def noise_level(self, timestep: torch.Tensor) -> torch.Tensor | None:
        """The highest sigma (0 to 1) of these timesteps, on their device; None if their scale is not known."""
        if self.timestep_scale is None:
            return None
        level = timestep.float() / self.timestep_scale  # bf16 would round what it is compared with
        return (1 - level if self.timestep_rises else level).max()


_FLUX = Family("first", single_stream=True, timestep_scale=1, grid=grids.of_positions, grid_on_device=True)
_CROSS = Family("none", cross_attention=("attn2",), timestep_scale=1000)

# Sigmas of the last dense step and the next one stand behind each number; tests compute them from the schedules.
# Those of 1024×1024 (mu 1.15, the largest that FLUX.1's schedule was given for), .888 and .870, .785 and .760. At
# 4096×4096 Diffusers extrapolates mu to 11.55, where the last step is at .9997 and every one dense: give the scheduler
# another shift there.
_FLUX_1 = replace(
    _FLUX,
    published=Published((256, 256), (80, 80), (16, 16), "arXiv 2504.16922 (GNA), FLUX at 4096×4096"),
    dense_first=DenseFirst(0.88, (), "9 of 28 steps for FLUX (GNA, arXiv 2504.16922)"),
    quality_first=DenseFirst(0.77, (), "half of 28 steps, our judgement"),
)
# Shift 7: .947 and .942, .919 and .913. Radial Attention (arXiv 2506.19852) keeps 12 steps, Sparse VideoGen 5.
_HUNYUAN_VIDEO = Family(
    "last",
    masks_text=True,
    timestep_scale=1000,
    grid=grids.of_video,
    published=Published(
        (30, 48, 80), (18, 24, 24), (16, 8, 8), "arXiv 2504.16922 (GNA), HunyuanVideo at 720p, 5 s"
    ),
    dense_first=DenseFirst(
        0.945, (), "15 of 50 steps for HunyuanVideo (GNA, arXiv 2504.16922; FastVideo's sliding tiles)"
    ),
    quality_first=DenseFirst(
        0.916, (0,), "20 of 50 steps, our judgement, and the first layer (Sparse VideoGen's scripts)"
    ),
)
# Shift 5: .912 and .902, the most of several. Text to video has 12 of 50 (Radial Attention and STA, .943) and 10 of 50
# (Sparse VideoGen, .955), Wan 2.2 11 of 40 (Radial Attention, at shift 3, where .907 has 10 of 40).
_WAN = replace(
    _CROSS,
    grid=grids.of_video,
    dense_first=DenseFirst(
        0.907, (0,), "14 of 40 steps and the first layer for Wan 2.1 image to video at 720p "
        "(Sparse VideoGen's scripts)"
    ),
    quality_first=DenseFirst(
        0.86, (0, 1, -2, -1), "for skip-softmax on Wan 2.2, the level of TensorRT-LLM's conservative setting and the "
        "two first and two last layers of NVIDIA's Model Optimizer"
    ),
)  # fmt: skip
# Timesteps of 1000, 20 apart: 819 and 799, 759 and 739.
_COGVIDEO = Family(
    "first",
    timestep_scale=1000,
    grid=grids.of_frames,
    dense_first=DenseFirst(
        0.8, (0, 1), "the first fifth of the timesteps and two layers for CogVideoX 1.5 (Sparse VideoGen's code)"
    ),
    quality_first=DenseFirst(
        0.75, (0, 1), "the first quarter of the timesteps (Sparse VideoGen's authors, in its issue 27) and two layers "
        "(its code)"
    ),
)  # fmt: skip

FAMILIES = {
    "ChromaTransformer2DModel": _FLUX,
    "CogVideoXTransformer3DModel": _COGVIDEO,
    # Its timestep is ln(sigma) / 4 in the first release's pipelines, sigma / (1 + sigma) in those since.
    "CosmosTransformer3DModel": replace(_CROSS, timestep_scale=None, grid=grids.of_video),
    "Flux2Transformer2DModel": _FLUX,
    "FluxTransformer2DModel": _FLUX_1,
    # Tokens of an image count as text: they stand with it, and are conditions like it.
    "HunyuanVideo15Transformer3DModel": Family(
        "last", masks_text=True, squares_masks=True, timestep_scale=1000, grid=grids.of_video
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "LTX2VideoTransformer3DModel": replace(
        _CROSS, cross_attention=("attn2", "_to_video_attn", "_to_audio_attn"), audio=("audio_attn1",),
        grid=grids.of_lengths,
    ),
    "LTXVideoTransformer3DModel": replace(_CROSS, grid=grids.of_lengths),
    "MochiTransformer3DModel": Family(
        "last", drops_padding=True, timestep_scale=1000, timestep_rises=True, grid=grids.of_video
    ),
    "QwenImageTransformer2DModel": Family("first", masks_text=True, timestep_scale=1, grid=grids.of_shapes),
    "SD3Transformer2DModel": Family("last", timestep_scale=1000, grid=grids.of_image),
    "SkyReelsV2Transformer3DModel": replace(_CROSS, grid=grids.of_video),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": replace(_CROSS, grid=grids.of_video),
    "ZImageTransformer2DModel": Family(
        "last", pads_grid=True, refiners=("context_refiner", "siglip_refiner"), masks_text=True,
        timestep="t", timestep_scale=1, timestep_rises=True, grid=grids.of_list,
    ),
}  # fmt: skip


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
    if text not in (None, family.text):  # where masks hide text was told of the place that is known
        family = replace(family, text=text, masks_text=False)
    return replace(family, grid=partial(grids.given, grid), grid_on_device=False) if grid else family
