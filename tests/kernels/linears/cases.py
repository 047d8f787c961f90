"""Groups, inputs and weights with which linear layers are tested."""

import pytest
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


def torch_device() -> torch.device:
    """Where `torch._scaled_mm` takes scales of rows: a GPU, or a CPU from PyTorch 2.12 or so on; skips elsewhere."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    x, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip(f"on a CPU, torch._scaled_mm of PyTorch {torch.__version__} has no scales of rows")
    return torch.device("cpu")


def on(device: torch.device, x):
    """A tensor, or a weight, on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return type(x).from_tensors(x.groups, {name: t.to(device) for name, t in x.tensors().items()})


def permutation_of(groups: Groups, seed: int = 0) -> torch.Tensor:
    """A permutation of the channels, int32."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(groups.in_features, generator=generator, device="cpu")
    return permutation.int().to(torch.get_default_device())


def rows_of(groups: Groups, rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Rows of very different size, one of zeros, one channel of outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups.in_features, generator=generator, device="cpu")
    x *= torch.exp2(torch.randint(-10, 10, (rows, 1), generator=generator, device="cpu").float())
    x[:, 5] *= 60
    x[rows // 2] = 0
    return x.to(torch.get_default_device(), dtype)


def weight_of(groups: Groups, out_features: int, seed: int = 2) -> torch.Tensor:
    """A weight, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, groups.in_features, generator=generator, device="cpu") * 0.05
    return weight.to(torch.get_default_device())


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance between two tensors, over the size of the second."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
