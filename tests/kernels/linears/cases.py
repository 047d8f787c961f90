"""Groups, inputs and weights with which linear layers are tested."""

import torch

from dma_diffusers.kernels.linears.groups import Groups

MIXED = ("mxfp4", "mxfp6_e2m3", "mxfp8")
BLOCK_GROUPS = {
    "micromix": Groups(MIXED, (2304, 512, 256)),
    "all 4 bits": Groups.whole("mxfp4", 96),
    "uneven": Groups(MIXED, (160, 32, 96)),
    "e3m2": Groups(("mxfp6_e3m2", "mxfp8"), (160, 128)),
    "4 and 8 bits": Groups(("mxfp4", "mxfp8"), (896, 128)),
    "8 bits": Groups.whole("mxfp8", 160),
    "nvfp4": Groups.whole("nvfp4", 160),
}
GROUPS = BLOCK_GROUPS | {name: Groups.whole(name, 160) for name in ("bf16", "fp8", "int8")}


def permutation_of(groups: Groups, seed: int = 0) -> torch.Tensor:
    """A permutation of the channels, int32."""
    return torch.randperm(groups.in_features, generator=torch.Generator().manual_seed(seed)).int()


def rows_of(groups: Groups, rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Rows of very different size, one of zeros, one channel of outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups.in_features, generator=generator)
    x = x * torch.exp2(torch.randint(-10, 10, (rows, 1), generator=generator).float())
    x[:, 5] *= 60
    x[rows // 2] = 0
    return x.to(dtype)


def weight_of(groups: Groups, out_features: int, seed: int = 2) -> torch.Tensor:
    """A weight, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, groups.in_features, generator=generator) * 0.05


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance between two tensors, over the size of the second."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
