"""Neighbourhoods, dense steps and dense layers, as others published them for single families."""

from dataclasses import dataclass

from dma_diffusers.grids import Grid
from dma_diffusers.kernels.tiling.neighborhood import check_dimensions
from dma_diffusers.kernels.tiling.policies import Neighborhood
from dma_diffusers.kernels.tiling.precision_map import Class


@dataclass(frozen=True)
class Published:
    """A neighbourhood that kept a family's pictures as they were, in full precision and without training.

    grid, window, stride: in tokens, as published. source: who published it. Its first steps ran with full attention
        (`DenseFirst`).
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    source: str

    def policy(self, grid: Grid, beyond: Class = Class.SKIP) -> Neighborhood:
        """A window with the same share of each side of another grid, which nobody has evaluated, and the same stride.

        beyond: the class of tiles beyond the window, SKIP as published, or MEAN. Raises ValueError for another class,
        or a grid of other dimensions.
        """
        check_dimensions("the published window", self.window, grid)
        sides = zip(grid, self.window, self.grid, strict=True)
        window = [max(round(length * side / of), 1) for length, side, of in sides]
        return Neighborhood(tuple(window), tuple(map(min, self.stride, window)), beyond=beyond)


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


# Each level lies between the sigmas of the last dense step and of the next one; tests compute them from the schedules.
# At 1024×1024 (mu 1.15, the largest that FLUX.1's schedule was given for) these are .888 and .870, .785 and .760. At
# 4096×4096 Diffusers extrapolates mu to 11.55: the last step is at .9997, and every step is dense, unless the scheduler
# is given another shift.
FLUX_1_NEIGHBORHOOD = Published((256, 256), (80, 80), (16, 16), "arXiv 2504.16922 (GNA), FLUX at 4096×4096")
FLUX_1_DENSE = DenseFirst(0.88, (), "9 of 28 steps for FLUX (GNA, arXiv 2504.16922)")
FLUX_1_QUALITY = DenseFirst(0.77, (), "half of 28 steps, our judgement")

# At shift 7 the sigmas are .947 and .942, .919 and .913. Radial Attention (arXiv 2506.19852) keeps 12 steps, Sparse
# VideoGen 5.
HUNYUAN_VIDEO_NEIGHBORHOOD = Published(
    (30, 48, 80), (18, 24, 24), (16, 8, 8), "arXiv 2504.16922 (GNA), HunyuanVideo at 720p, 5 s"
)
HUNYUAN_VIDEO_DENSE = DenseFirst(
    0.945, (), "15 of 50 steps for HunyuanVideo (GNA, arXiv 2504.16922; FastVideo's sliding tiles)"
)
HUNYUAN_VIDEO_QUALITY = DenseFirst(
    0.916, (0,), "20 of 50 steps, our judgement, and the first layer (Sparse VideoGen's scripts)"
)

# At shift 5 the sigmas are .912 and .902, and the number of steps is the largest of several: for text to video 12 of 50
# (Radial Attention and STA, .943) and 10 of 50 (Sparse VideoGen, .955) were published, for Wan 2.2 11 of 40 (Radial
# Attention, at shift 3, where .907 has 10 of 40).
WAN_DENSE = DenseFirst(
    0.907,
    (0,),
    "14 of 40 steps and the first layer for Wan 2.1 image to video at 720p (Sparse VideoGen's scripts)",
)
WAN_QUALITY = DenseFirst(
    0.86, (0, 1, -2, -1), "for skip-softmax on Wan 2.2, the level of TensorRT-LLM's conservative setting and the "
    "two first and two last layers of NVIDIA's Model Optimizer"
)  # fmt: skip

# The timesteps, of 1000 and 20 apart, are 819 and 799, 759 and 739.
COGVIDEO_DENSE = DenseFirst(
    0.8, (0, 1), "the first fifth of the timesteps and two layers for CogVideoX 1.5 (Sparse VideoGen's code)"
)
COGVIDEO_QUALITY = DenseFirst(
    0.75, (0, 1), "the first quarter of the timesteps (Sparse VideoGen's authors, in its issue 27) and two layers "
    "(its code)"
)  # fmt: skip
