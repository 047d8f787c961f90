"""The families of models: where the text stands, which grid the other tokens lie on, and what was published."""

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
        """A window with the same share of each side of another grid, which nobody has evaluated, and the same stride.

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
    """A family of transformers, which treat their tokens alike.

    text: the place of the text in joint attention, "first" or "last"; "none" if only cross-attention attends to text.
    single_stream: modules called without `encoder_hidden_states` get text and image as one sequence.
    pads_grid: modules get one sequence in which padding stands between the grid's tokens and the text; all tokens that
        are not the grid's count as text. Calls that don't tell their grid fall back to stock.
    drops_padding: modules attend to fewer tokens than they were given, without the text's padding.
    cross_attention: last parts of the names of modules that do cross-attention.
    audio: last parts of the names of modules that attend among tokens of sound.
    refiners: parts of the names of modules that see the text alone.
    masks_text: the model masks no keys of joint attention but text.
    squares_masks: modules mask padding as queries too, though nobody reads these rows; they are made to mask keys
        alone, which spares them a mask of tokens × tokens.
    timestep: the name of the model's argument. timestep_scale: its value at pure noise; None if that is not known.
    timestep_rises: the timestep is 0 at pure noise, and `timestep_scale` without noise.
    grid: finds the grid that the tokens other than text lie on; None if that is not known.
    grid_on_device: finding the grid waits for the device.
    published: a neighbourhood that was published for the family; None if none is known.
    dense_first: the steps and layers that published work keeps dense; None if none are known, or needed.
    quality_first: more of these, for users who would rather wait; known if `dense_first` is.
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
        """The role for which the module of this name keeps stock attention; empty if it need not."""
        if any(part in module for part in self.refiners):
            return "token refiner"
        if module.endswith(self.audio):
            return "attention among tokens of sound"
        return "cross-attention" if module.endswith(self.cross_attention) else ""

    def text_range(
        self, queries: int, keys: int, hidden: int, encoder: int, model: int | None, grid: int | None = None
    ) -> tuple[int, int] | None:
        """The text tokens (start, stop) of a self- or joint-attention call, (0, 0) if it has none.

        The arguments are numbers of tokens. keys: in the call's sequence. hidden, encoder: in the `hidden_states` and
        `encoder_hidden_states` that the module was given, encoder 0 for none. model: in the text that the model was
        given. grid: on the model's grid, if that is known. The result is None if the text cannot be told: in
        cross-attention, and in models that were given no text or tell no grid.
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
        """The keys that a mask may hide from calls with this text: "text" for those of text alone, "keys" for any."""
        return "text" if self.masks_text and text[0] < text[1] else "keys"

    def noise_level(self, timestep: torch.Tensor) -> torch.Tensor | None:
        """The highest sigma (0 to 1) of these timesteps, on their device; None if their scale is not known."""
        if self.timestep_scale is None:
            return None
        level = timestep.float() / self.timestep_scale  # bf16 would round what it is compared with
        return (1 - level if self.timestep_rises else level).max()


_FLUX = Family("first", single_stream=True, timestep_scale=1, grid=grids.of_positions, grid_on_device=True)
_CROSS = Family("none", cross_attention=("attn2",), timestep_scale=1000)

# Each level lies between the sigmas of the last dense step and of the next one; tests compute them from the schedules.
# At 1024×1024 (mu 1.15, the largest that FLUX.1's schedule was given for) these are .888 and .870, .785 and .760. At
# 4096×4096 Diffusers extrapolates mu to 11.55: the last step is at .9997, and every step is dense, unless the scheduler
# is given another shift.
_FLUX_1 = replace(
    _FLUX,
    published=Published((256, 256), (80, 80), (16, 16), "arXiv 2504.16922 (GNA), FLUX at 4096×4096"),
    dense_first=DenseFirst(0.88, (), "9 of 28 steps for FLUX (GNA, arXiv 2504.16922)"),
    quality_first=DenseFirst(0.77, (), "half of 28 steps, our judgement"),
)
# At shift 7 the sigmas are .947 and .942, .919 and .913. Radial Attention (arXiv 2506.19852) keeps 12 steps, Sparse
# VideoGen 5.
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
# At shift 5 the sigmas are .912 and .902, and the number of steps is the largest of several: for text to video 12 of 50
# (Radial Attention and STA, .943) and 10 of 50 (Sparse VideoGen, .955) were published, for Wan 2.2 11 of 40 (Radial
# Attention, at shift 3, where .907 has 10 of 40).
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
# The timesteps, of 1000 and 20 apart, are 819 and 799, 759 and 739.
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
    # The tokens of a given image count as text: they stand with it, and are conditions like it.
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
    if known is None:
        if text is None:
            raise ValueError(
                f"{type(model).__name__} is of no known family ({', '.join(FAMILIES)}): "
                'say where its joint attention has text, with text="first", "last" or "none"'
            )
        known = Family(text, single_stream=True)
    if text not in (None, known.text):  # where masks hide text was told of the place that is known
        known = replace(known, text=text, masks_text=False)
    return replace(known, grid=partial(grids.given, grid), grid_on_device=False) if grid else known
