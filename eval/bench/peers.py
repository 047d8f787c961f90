"""This module lists the kernels of others that are timed beside ours where they are installed."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_diffusers.errors import first_line
from dma_diffusers.eval.bench import flash_fp8
from dma_diffusers.eval.bench.bound import Products
from dma_diffusers.eval.bench.cudnn_fp8 import cudnn_fp8
from dma_diffusers.eval.bench.entries import FULL, LOW_BIT, Entry, Prepared, Tensors


@dataclass(frozen=True)
class Peer:
    """A peer is a kernel of others.

    call: takes its module and q, k, v `[B, H, S, D]` in bf16; a low-bit peer quantises them in the call. qk, pv:
    letters of MATRIX_RATES. modules: the names under which it may be installed. fits: says if a module of such a name
    is this peer; two versions of one package can't share a name. writes_inputs: says if it changes its inputs, and so
    gets copies of its own. distribution: the package that tells its version. quantise, kernel: the parts of its call,
    for one whose kernel takes what was quantised before; it is timed alone as well.
    """

    name: str
    kind: str
    qk: str
    pv: str
    modules: tuple[str, ...]
    distribution: str
    call: Callable[[ModuleType, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    fits: Callable[[ModuleType], bool] = lambda module: True
    writes_inputs: bool = False
    quantise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any] | None = None
    kernel: Callable[[ModuleType, Any], torch.Tensor] | None = None

    def load(self) -> ModuleType:
        """Return its module; raises ImportError, in one line, that says why there is none."""
        reasons = []
        for name in self.modules:
            try:
                module = importlib.import_module(name)
            except Exception as error:  # a module that was built for another torch may fail in any way
                reasons.append(first_line(error))
                continue
            if self.fits(module):
                return module
            reasons.append(f"{name} is another version")
        raise ImportError("; ".join(reasons))

    @property
    def version(self) -> str:
        """Return the version that is installed, or the reason why none is."""
        try:
            module = self.load()
        except ImportError as error:
            return f"absent: {error}"
        if module is torch:
            return f"cuDNN {torch.backends.cudnn.version()}"
        if module.__name__ == self.modules[0]:
            try:
                return metadata.version(self.distribution)
            except metadata.PackageNotFoundError:
                pass
        return f"{module.__name__}, whose version isn't told"

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.kind, self._prepare)

    def _prepare(self, copies: Sequence[Tensors]) -> Prepared:
        call = partial(self.call, self.load())
        if self.writes_inputs:
            copies = [tuple(x.clone() for x in copy) for copy in copies]
        products, quantise = [Products(1.0, self.qk, self.pv)], self.quantise

        def whole(number: int) -> torch.Tensor:
            return call(*copies[number % len(copies)])

        if quantise is None or self.kernel is None:
            return Prepared(products, whole)
        attend, quantised = partial(self.kernel, self.load()), [quantise(*copy) for copy in copies]
        return Prepared(
            products,
            whole,
            lambda number: attend(quantised[number % len(copies)]),
            lambda number: quantise(*copies[number % len(copies)]),
        )


def _cudnn(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _flash_attention_4(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=False)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flash_attention_3(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flash_attention_3_fp8(
    module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return flash_fp8.attend(module, flash_fp8.quantise(q, k, v))


def _sage_1(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return module.sageattn(q, k, v, tensor_layout="HND", is_causal=False, smooth_k=True)


def _sage_2(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    is_hopper = torch.cuda.get_device_capability(q.device) == (9, 0)
    attend = module.sageattn_qk_int8_pv_fp8_cuda_sm90 if is_hopper else module.sageattn
    return attend(q, k, v, tensor_layout="HND", is_causal=False)


def _is_sage_2(module: ModuleType) -> bool:
    return hasattr(module, "sageattn_qk_int8_pv_fp8_cuda_sm90")


_FLASH_ATTENTION_3 = ("fa3_fwd_interface", "flash_attn_interface")

PEERS = (
    Peer("cuDNN SDPA bf16", FULL, "H", "H", ("torch",), "torch", _cudnn),
    Peer(
        "FlashAttention-4 bf16", FULL, "H", "H", ("flash_attn.cute",), "flash-attn-4", _flash_attention_4
    ),
    Peer(
        "FlashAttention-3 bf16", FULL, "H", "H", _FLASH_ATTENTION_3, "fa3-fwd", _flash_attention_3
    ),
    Peer(
        "SageAttention 1", LOW_BIT, "I", "H", ("sageattention", "sageattention1"), "sageattention", _sage_1,
        lambda module: not _is_sage_2(module), writes_inputs=True,  # it subtracts K's mean in place
    ),
    Peer(
        "SageAttention 2", LOW_BIT, "I", "Q", ("sageattention", "sageattention2"), "sageattention", _sage_2,
        _is_sage_2,
    ),
    Peer(
        "FlashAttention-3 FP8", LOW_BIT, "Q", "Q", _FLASH_ATTENTION_3, "fa3-fwd", _flash_attention_3_fp8,
        quantise=flash_fp8.quantise, kernel=flash_fp8.attend,
    ),
    Peer("cuDNN SDPA FP8", LOW_BIT, "Q", "Q", ("cudnn",), "nvidia-cudnn-frontend", cudnn_fp8),
)  # fmt: skip
