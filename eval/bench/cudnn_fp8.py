"""This module calls cuDNN's FP8 attention through nvidia-cudnn-frontend, quantising by plain casts to e4m3."""

import math
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

# Probabilities up to 1 fill e4m3. q, k and v are cast as they are, which is as cheap as quantising gets.
_SCALES = {
    "descale_q": 1.0,
    "descale_k": 1.0,
    "descale_v": 1.0,
    "descale_s": 1 / 256,
    "scale_s": 256.0,
}


def cudnn_fp8(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention of q, k and v `[B, H, S, D]`, each contiguous.

    The first call with a size builds its plan and sets the output's scale. On Hopper cuDNN writes e4m3 alone; the way
    back to the inputs' dtype is part of the call.
    """
    plan = _plan(module, tuple(q.shape), q.device)
    if plan.descale_out is None:
        plan.scale_output(F.scaled_dot_product_attention(q, k, v).abs().amax().item())
    return plan.run(*(x.to(torch.float8_e4m3fn) for x in (q, k, v))).to(q.dtype).mul_(plan.descale_out)


@cache
def _plan(module: ModuleType, size: tuple[int, ...], device: torch.device) -> "_Plan":
    return _Plan(module, size, device)


class _Plan:
    """A plan is cuDNN's graph for one size, built. Building it raises cuDNN's errors where there is no kernel."""

    def __init__(self, cudnn: ModuleType, size: tuple[int, ...], device: torch.device):
        e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        strides = torch.empty(size, device="meta").stride()
        one = {"dim": [1] * 4, "stride": [1] * 4, "data_type": fp32}
        graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32)
        inputs = {
            x: graph.tensor(name=x, dim=list(size), stride=list(strides), data_type=e4m3) for x in "qkv"
        }
        scales = {name: graph.tensor(name=name, **one) for name in (*_SCALES, "scale_o")}
        out, _, *largest = graph.sdpa_fp8(**inputs, **scales, is_inference=True, attn_scale=size[-1] ** -0.5)
        out.set_output(True).set_dim(list(size)).set_stride(list(strides)).set_data_type(e4m3)
        for amax in largest:
            amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.descale_out: float | None = None
        self._graph, self._inputs, self._out, self._scale_out = graph, inputs, out, scales["scale_o"]
        constant = {scales[name]: value for name, value in _SCALES.items()} | dict.fromkeys(largest, 0.0)
        self._tensors = {
            key: torch.full((1, 1, 1, 1), value, device=device) for key, value in constant.items()
        }
        self._workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)

    def scale_output(self, amax: float) -> None:
        """Let results up to `amax` fill e4m3 to 256 at most, by a power of two; FP8 recipes know it from before."""
        self.descale_out = 2.0 ** math.ceil(math.log2(amax / 256))
        scale = torch.full((1, 1, 1, 1), 1 / self.descale_out, device=self._workspace.device)
        self._tensors[self._scale_out] = scale

    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Launch the graph on e4m3 q, k, v."""
        out = torch.empty_like(inputs[0])
        given = dict(zip(self._inputs.values(), inputs, strict=True)) | {self._out: out}
        self._graph.execute(self._tensors | given, self._workspace)
        return out
