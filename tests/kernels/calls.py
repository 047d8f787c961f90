"""Whole attention calls for tests, run by the reference and by the kernels."""

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.call import Call as KernelCall
from dma_diffusers.kernels.call import Norms
from dma_diffusers.kernels.plan import Plan, make
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.fine_mask import FineMask, hide_empty_slots
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Diagonal, parse
from dma_diffusers.kernels.tiling.precision_map import Class, PrecisionMap, build_map


@dataclass(frozen=True)
class Call:
    """One attention call: shapes, formats, policy, masks.

    has_norms: whether q and k go through RMSNorm, with own weights for the first 50 tokens. rounds_twice: if these do.
    has_token_order: whether its tokens stand in a random order, with `empty_slots` among them.
    parts: of the sequence, each of which has its text at `text`, as of a `Layout`.
    policy: words of a policy on `grid`, in place of window, sink and random order; `text` is in tokens then.
    masks_text: whether the mask over keys hides text alone, which only policies on a grid make use of here.
    means: LOW tiles are MEAN but for every so many-th diagonal; 1 for all of them, 0 for none.
    skip_below: of the softmax; every other tile's keys, or of many tiles the last ones', are then such that it may be
        skipped.
    """

    q_length: int
    k_length: int
    head_dim: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    high: str = "mxfp8"
    low: str = "mxfp4"
    window: int = 128
    sink: int = 128
    text: tuple[int, int] = (0, 0)
    parts: int = 1
    is_causal: bool = False
    masks_keys: bool = False
    has_rope: bool = False
    has_norms: bool = False
    rounds_twice: bool = False
    rotation: str = "none"
    smooth_k: bool = True
    smooth_v: bool = True
    has_token_order: bool = False
    empty_slots: int = 0
    policy: str = ""
    grid: tuple[int, ...] = ()
    masks_text: bool = False
    means: int = 0
    skip_below: float | None = None
    dtype: torch.dtype = torch.float32
    tokens_first: bool = False
    seed: int = 0
    name: str = field(default="", compare=False)

    @cached_property
    def plan(self) -> Plan:
        """That of a policy on the grid."""
        layout = Layout(self.q_length, self.k_length, self.text, self.grid, self.parts)
        return make(parse(self.policy), layout, masks_text=self.masks_text)

    @property
    def layout(self) -> Layout:
        if self.policy:
            slots = len(self.plan.token_order)
            return Layout(slots, slots, (0, self.parts * (self.text[1] - self.text[0])))
        lengths = self.q_length + self.empty_slots, self.k_length + self.empty_slots
        return Layout(*lengths, self.text, parts=self.parts)

    @property
    def token_order(self) -> torch.Tensor | None:
        """int32 `[slots]`."""
        if self.policy:
            return self.plan.token_order
        if not self.has_token_order:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        token_order = torch.randperm(self.q_length + self.empty_slots, generator=generator).int()
        return torch.where(token_order < self.q_length, token_order, -1)

    @property
    def fine_mask(self) -> FineMask | None:
        """The fine mask that hides empty slots, or the neighbourhood's."""
        if self.policy:
            return self.plan.fine_mask
        return hide_empty_slots(self.token_order) if self.empty_slots else None

    def fine_mask_on(self, device: torch.device) -> FineMask | None:
        return self.fine_mask and self.fine_mask.to(device)

    def token_order_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.token_order is None else self.token_order.to(device)

    def in_slots(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., tokens, D]` in the order of slots, zeros where they are empty."""
        return x if self.token_order is None else F.pad(x, (0, 0, 0, 1))[..., self.token_order, :]

    def of_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., slots, D]` in the order of tokens: the inverse of `in_slots`."""
        return x if self.token_order is None else x[..., self.token_order.argsort()[-self.q_length :], :]

    def map(self) -> PrecisionMap:
        if self.policy:
            return self.plan.precision_map
        policy = Diagonal(self.window, self.sink)
        classes = policy.classes(self.layout, self.is_causal)
        if self.means:
            q_tile, k_tile = (torch.arange(count) for count in classes.shape[-2:])
            is_far = (self.means == 1) | ((q_tile[:, None] + k_tile) % self.means > 0)
            classes = torch.where(is_far & (classes == Class.LOW), int(Class.MEAN), classes)
        return build_map(classes, self.layout, self.is_causal, self.token_order)

    def tensors(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """q, k, v and the key mask (or None). Rows differ in size, and keys have a mean, as real ones do.

        Before a norm, the squares of q and of k add up to the same sum in any order.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def random(heads: int, length: int) -> torch.Tensor:
            shape = (self.batch, heads, length, self.head_dim)
            x = torch.randn(shape, generator=generator)
            x = x * (0.5 + torch.rand(shape[:3], generator=generator)[..., None])
            x = x.to(self.dtype).to(device)
            return x.transpose(1, 2).contiguous().transpose(1, 2) if self.tokens_first else x

        q, k, v = random(self.heads, self.q_length), random(self.kv_heads, self.k_length), None
        if self.skip_below is not None:
            tile = torch.arange(self.layout.k_length) // 128
            is_weak = tile >= 18 if self.layout.k_length > 2500 else tile % 2 == 1
            size = torch.where(is_weak, 0.1, 4.0)[:, None]
            k = k * self.of_tokens(size).to(self.dtype).to(device)
        k = k + torch.randn(self.head_dim, generator=generator).to(self.dtype).to(device)
        if self.has_norms:
            q, k = (x.mul(4).round().clamp(-24, 24).div(4) for x in (q, k))
        v = random(self.kv_heads, self.k_length)
        mask = None
        if self.masks_keys:
            mask = (torch.rand(self.batch, self.k_length, generator=generator) > 0.3).to(device)
        if self.masks_text:
            mask[:, : self.text[0]] = mask[:, self.text[1] :] = True
        return q, k, v, mask

    def ropes(
        self, device: torch.device | str = "cpu"
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor] | None]:
        """The keyword arguments `q_rope` and `k_rope`: queries stand at other slots than keys."""
        if not self.has_rope:
            return {"q_rope": None, "k_rope": None}

        def tables(length: int, first: float) -> tuple[torch.Tensor, torch.Tensor]:
            speed = 100.0 ** (-torch.arange(self.head_dim // 2) / (self.head_dim // 2))
            angles = (first + torch.arange(length))[:, None] * speed
            return angles.cos().to(device), angles.sin().to(device)

        return {"q_rope": tables(self.q_length, 7.0), "k_rope": tables(self.k_length, 0.0)}

    def norms(self, device: torch.device | str = "cpu") -> Norms | None:
        """The norms of q and of k, whose weights differ."""
        if not self.has_norms:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        q, k, q_first, k_first = (
            (0.5 + torch.rand(self.head_dim, generator=generator)).to(self.dtype).to(device) for _ in range(4)
        )
        return Norms(q, k, 1e-6, 50, q_first, k_first, self.rounds_twice)

    @property
    def prepared(self) -> dict[str, Any]:
        """How q, k and v are prepared, as fields of a call."""
        return {"rotation": self.rotation, "smooth_k": self.smooth_k, "smooth_v": self.smooth_v}

    def __str__(self) -> str:
        return self.name or (
            f"{self.batch}x{self.heads}x{self.q_length}x{self.k_length}x{self.head_dim}-{self.high}-{self.low}"
            f"-w{self.window}-s{self.sink}{'-causal' * self.is_causal}{'-masked' * self.masks_keys}"
            f"{'-ordered' * self.has_token_order}-{self.policy}{'-skips' * (self.skip_below is not None)}"
            f"{f'-means{self.means}' * (self.means > 0)}"
        )


def seen(call: Call, mask: torch.Tensor | None) -> torch.Tensor:
    """Says which key each query sees, by slots: bool `[B or 1, 1, Sq, Sk]`."""
    q_token = torch.arange(call.layout.q_length)[:, None]
    k_token = torch.arange(call.layout.k_length)[None, :]
    visible = (k_token <= q_token) if call.is_causal else (k_token >= 0).expand(len(q_token), -1)
    mask = torch.ones(1, call.k_length, dtype=torch.bool) if mask is None else mask.cpu()
    return visible & call.in_slots(mask[:, None, :, None]).mT


def split(q, k, v, precision_map, high, low, **given) -> tuple[KernelCall, Plan, Precisions, dict]:
    """A call, its plan and its precisions from single arguments, and the arguments that are none of theirs."""
    of_call = {each.name: given.pop(each.name) for each in fields(KernelCall)[3:] if each.name in given}
    of_plan = {each.name: given.pop(each.name) for each in fields(Plan)[1:] if each.name in given}
    return KernelCall(q, k, v, **of_call), Plan(precision_map, **of_plan), Precisions.parse(high, low), given


def by_reference(*positional, **given) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.attention`; arguments as of `split`, and its own."""
    call, plan, precisions, options = split(*positional, **given)
    return reference.attention(call, plan, precisions, **options)


def launched(*positional, lowering="native", run=None, **given):
    """`launch.attention` on the device of q; arguments as of `split`, its own, and what runs a kernel."""
    from dma_diffusers.kernels.attention import launch
    from dma_diffusers.kernels.device.launch import Launcher

    call, plan, precisions, options = split(*positional, **given)
    launcher = Launcher() if run is None else Launcher(run)
    return launch.attention(
        call, plan.to(call.q.device), precisions, lowering=lowering, launcher=launcher, **options
    )


def as_the_kernel(call: Call, lowering: str, device: torch.device, target: str | None = None) -> dict:
    """The reference's options: hopper.py makes codes of means; who skips; the keys of one maximum."""
    from dma_diffusers.kernels.attention.launch import Variant

    q = torch.empty(1, 1, 1, call.head_dim, device=device)
    precisions = Precisions.parse(call.high, call.low)
    variant = Variant.of(
        KernelCall(q, q, q), Plan(call.map(), skip_below=call.skip_below), precisions, lowering, target
    )
    keys = variant.tuned.keys
    return {"means_by_codes": variant.in_gluon, "skip_rows": variant.tuned.rows, "keys_at_once": keys}


def with_hidden(tensors: tuple[torch.Tensor, ...], of_k: float, of_v: float) -> tuple[torch.Tensor, ...]:
    """q, k, v and mask: hidden keys and values are these multiples of the largest number that their dtype has."""
    q, k, v, mask = tensors
    hidden, largest = ~mask[:, None, :, None], torch.finfo(k.dtype).max
    return q, k.masked_fill(hidden, of_k * largest), v.masked_fill(hidden, of_v * largest), mask


def relative_l2(x: torch.Tensor, reference: torch.Tensor) -> float:
    """‖x − reference‖ / ‖reference‖; of a reference that is zero, ‖x‖."""
    x, reference = x.cpu().double(), reference.cpu().double()
    norm = reference.norm().item()
    return (x - reference).norm().item() / (norm or 1.0)


NAMED_CALLS = [
    Call(1, 1, 64, name="one-token"),
    Call(63, 63, 64, name="63"),
    Call(111, 111, 40, name="111-head-dim-40"),
    Call(129, 129, 72, name="129-head-dim-72"),
    Call(257, 257, 128, name="257"),
    Call(384, 384, 64, name="whole-tiles"),
    Call(512, 512, 128, window=0, sink=0, name="all-low"),
    Call(640, 640, 64, window=384, sink=256, name="wide-band"),
    Call(640, 640, 64, window=200, sink=1, name="widths-round-up"),
    Call(640, 640, 64, text=(0, 128), name="text-first"),
    Call(600, 600, 64, text=(500, 600), sink=0, name="text-last"),
    Call(513, 513, 64, text=(100, 140), sink=0, name="text-over-two-tiles"),
    Call(384, 384, 64, is_causal=True, name="causal"),
    Call(600, 600, 128, is_causal=True, sink=256, window=256, name="causal-sinks"),
    Call(300, 300, 64, is_causal=True, window=0, sink=0, name="causal-low"),
    Call(130, 700, 64, name="cross-short-queries"),
    Call(700, 130, 64, name="cross-short-keys"),
    Call(257, 257, 64, heads=4, kv_heads=2, batch=2, name="gqa"),
    Call(257, 257, 64, heads=3, kv_heads=1, batch=2, tokens_first=True, name="mqa-tokens-first"),
    Call(300, 300, 64, batch=2, masks_keys=True, name="key-mask"),
    Call(512, 512, 64, batch=2, masks_keys=True, is_causal=True, name="key-mask-causal"),
    Call(384, 384, 64, dtype=torch.bfloat16, tokens_first=True, name="bf16"),
    Call(257, 257, 96, dtype=torch.float16, name="fp16-head-dim-96"),
    Call(257, 257, 36, dtype=torch.bfloat16, name="head-dim-36-unaligned-rows"),
    Call(130, 130, 33, high="bf16", dtype=torch.bfloat16, name="head-dim-33"),
    Call(65, 65, 1, name="head-dim-1"),
    Call(384, 384, 64, low="mxfp8", high="mxfp8_e5m2", name="mxfp8-e5m2"),
    Call(256, 256, 256, name="head-dim-256"),
    Call(130, 260, 160, name="head-dim-160"),
    Call(384, 384, 128, high="bf16", low="int8", name="bf16-int8"),
    Call(300, 300, 64, high="bf16", low="fp8", window=0, sink=0, is_causal=True, name="bf16-fp8-causal"),
    Call(200, 200, 64, high="bf16", low="bf16", dtype=torch.bfloat16, name="bf16-everywhere"),
    Call(300, 300, 128, high="bf16", low="mxfp4", dtype=torch.bfloat16, tokens_first=True, name="bf16-mxfp4"),
    Call(300, 300, 64, high="int8", low="fp8", batch=2, masks_keys=True, name="int8-fp8-key-mask"),
    Call(384, 384, 64, low="mxfp6_e2m3", name="mxfp6-e2m3"),
    Call(300, 300, 72, low="mxfp6_e3m2", window=0, sink=0, name="mxfp6-e3m2"),
    Call(384, 384, 64, has_rope=True, name="rope"),
    Call(300, 200, 72, has_rope=True, high="bf16", low="int8", heads=4, name="rope-cross-bf16-int8"),
    Call(111, 111, 40, has_token_order=True, name="order-111"),
    Call(300, 300, 64, has_token_order=True, masks_keys=True, has_rope=True, name="order-key-mask-rope"),
    Call(
        384, 384, 128, high="bf16", low="int8", heads=6, dtype=torch.bfloat16, has_norms=True, has_rope=True,
        name="norms-rope",
    ),
    Call(300, 200, 40, has_norms=True, heads=4, masks_keys=True, dtype=torch.bfloat16, name="norms-cross"),
    Call(384, 384, 128, heads=4, high="bf16", low="int8", text=(0, 77), has_token_order=True, seed=1),
    Call(
        300, 300, 72, high="bf16", low="fp8", window=300, has_token_order=True, has_rope=True,
        name="order-all-high",
    ),
    Call(
        300, 300, 72, low="int8", window=0, sink=0, has_token_order=True, empty_slots=60,
        name="order-empty-low",
    ),
    Call(200, 200, 64, high="bf16", low="int8", masks_keys=True, has_token_order=True, empty_slots=180),
    Call(
        500, 500, 64, heads=3, kv_heads=1, has_token_order=True, empty_slots=12,
        name="order-empty-in-every-tile",
    ),
    Call(
        2100, 2100, 40, heads=1, kv_heads=1, high="bf16", low="int8", has_token_order=True,
        name="order-2100",
    ),
    Call(384, 384, 64, high="bf16/fp8", low="int8/bf16", name="pv-exchanged"),
    Call(300, 300, 128, high="mxfp8/fp8", low="mxfp4", is_causal=True, name="pv-fp8-everywhere"),
    Call(300, 300, 64, low="mxfp4/bf16", window=0, sink=0, name="pv-bf16-all-low"),
    Call(130, 500, 72, high="bf16/fp8", low="bf16/bf16", batch=2, masks_keys=True, name="pv-cross-key-mask"),
    Call(
        300, 300, 64, high="int8/fp8", low="mxfp4/bf16", has_token_order=True, empty_slots=40, skip_below=0.05,
        name="pv-order-empty-skips",
    ),
    Call(4173, 4173, 64, heads=1, kv_heads=1, name="4173"),
    Call(640, 640, 64, skip_below=0.05, name="skips"),
    Call(513, 513, 128, high="bf16", low="int8", window=0, sink=0, skip_below=0.05, name="skips-all-low"),
    Call(
        600, 600, 72, high="bf16", low="fp8", window=10_000, batch=2, skip_below=0.05, name="skips-all-high",
    ),
    Call(
        700, 700, 64, high="bf16", low="int8", heads=4, is_causal=True, masks_keys=True, skip_below=0.05,
        name="skips-causal-key-mask",
    ),
    Call(
        450, 450, 64, high="bf16", low="int8", text=(0, 40), has_token_order=True, empty_slots=100,
        skip_below=0.05, name="skips-order-empty",
    ),
    Call(200, 700, 128, low="mxfp6_e2m3", window=0, sink=0, skip_below=0.05, name="skips-cross-rows"),
    Call(
        60, 3328, 40, heads=1, kv_heads=1, low="int8", high="bf16", skip_below=0.05,
        name="skips-looks-now-and-then",
    ),
    Call(
        4173, 130, 40, heads=1, kv_heads=1, high="bf16", low="int8", dtype=torch.bfloat16, name="4173-cross",
    ),
    Call(600, 600, 64, text=(100, 140), parts=2, sink=0, name="text-in-two-parts"),
    Call(560, 600, 64, text=(0, 40), sink=0, name="queries-omit-text"),
    Call(
        520, 600, 64, batch=2, masks_keys=True, text=(260, 300), parts=2, sink=0, high="bf16", low="int8",
        name="queries-omit-text-in-two-parts",
    ),
    Call(
        300, 300, 64, high="bf16", low="int8", dtype=torch.bfloat16, has_norms=True, rounds_twice=True, has_rope=True,
        name="norms-twice-rounded",
    ),
    Call(1, 1, 64, window=0, sink=0, means=1, name="means-one-token"),
    Call(63, 63, 64, window=0, sink=0, means=1, high="bf16", low="int8", name="means-63"),
    Call(111, 111, 40, window=0, sink=0, means=1, has_token_order=True, name="means-order-111"),
    Call(640, 640, 64, means=1, name="means-but-near"),
    Call(640, 640, 64, means=3, name="means-and-mxfp4"),
    Call(512, 640, 64, means=2, window=0, sink=0, name="means-lent-by-no-tile"),
    Call(640, 640, 128, means=3, high="bf16", low="int8", dtype=torch.bfloat16, text=(0, 77), name="means-int8"),
    Call(640, 600, 128, means=2, window=0, sink=0, high="bf16", low="int8", name="means-int8-no-high"),
    Call(600, 600, 64, means=1, high="bf16", low="int8", dtype=torch.bfloat16, tokens_first=True, name="means-bf16"),
    Call(400, 400, 64, means=2, high="bf16", low="mxfp4", dtype=torch.bfloat16, name="means-bf16-smoothed"),
    Call(600, 600, 72, means=3, high="bf16", low="fp8", is_causal=True, has_rope=True, name="means-causal"),
    Call(
        520, 520, 64, batch=2, heads=4, kv_heads=2, masks_keys=True, means=2, window=0, low="int8",
        name="means-gqa-key-mask",
    ),
    Call(
        500, 500, 64, heads=3, kv_heads=1, has_token_order=True, empty_slots=120, masks_keys=True, means=2,
        high="bf16", low="int8", has_norms=True, has_rope=True, dtype=torch.float16, name="means-order-empty",
    ),
    Call(300, 500, 256, means=2, window=0, low="fp8", name="means-head-dim-256"),
    Call(384, 384, 160, means=2, high="mxfp8/fp8", low="mxfp8/bf16", name="means-pv-exchanged"),
    Call(384, 384, 36, means=2, low="mxfp6_e2m3", dtype=torch.bfloat16, name="means-mxfp6"),
    Call(130, 500, 64, means=1, high="bf16/fp8", low="bf16", batch=2, name="means-bf16-fp8-values"),
    Call(640, 640, 64, means=2, high="nvfp4", low="mxfp4", name="means-nvfp4"),
    Call(700, 700, 64, means=2, high="bf16", low="int8", skip_below=0.05, name="means-skips"),
    Call(4173, 4173, 64, heads=1, kv_heads=1, means=1, high="bf16", low="int8", name="means-4173"),
    Call(200, 4173, 40, heads=1, kv_heads=1, means=2, window=0, low="int8", name="means-of-two-words"),
]  # fmt: skip

_ONE_HEAD = {"heads": 1, "kv_heads": 1}
GRID_CALLS = [
    Call(280, 280, 64, **_ONE_HEAD, policy="neighborhood(window=7x9, stride=2x3)", grid=(14, 20), name="2-D"),
    Call(
        300, 300, 128, **_ONE_HEAD, high="bf16", low="int8", text=(0, 20), grid=(14, 20),
        policy="neighborhood(window=9x12, stride=4x8, high=5x5)", name="2-D-nested-text",
    ),
    Call(
        320, 320, 40, kv_heads=1, high="bf16", low="int8", text=(280, 320), masks_keys=True, has_rope=True,
        grid=(14, 20), policy="neighborhood(window=7x9)", name="2-D-text-last-key-mask",
    ),
    Call(
        252, 252, 64, **_ONE_HEAD, batch=2, policy="neighborhood(window=3x4x5, stride=1x2x2, high=1x2x3)",
        grid=(4, 7, 9), name="3-D-nested",
    ),
    Call(252, 252, 128, low="int8", policy="neighborhood(window=3x4x5)", grid=(4, 7, 9), name="3-D-int8"),
    Call(
        280, 280, 64, heads=4, high="bf16", low="int8", policy="neighborhood(window=13x19)", grid=(14, 20),
        skip_below=0.05, name="2-D-skips",
    ),
    Call(
        400, 400, 64, kv_heads=1, batch=2, masks_keys=True, text=(252, 400), masks_text=True, high="bf16", low="int8",
        policy="neighborhood(window=4x7x9, stride=4x7x9)", grid=(4, 7, 9), name="masked-text",
    ),
    Call(252, 252, 72, low="fp8", high="bf16", policy="neighborhood(window=4x4x5)", grid=(4, 7, 9), name="3-D-fp8"),
    Call(257, 257, 64, masks_keys=True, text=(0, 5), policy="neighborhood(high=3x3x3)", grid=(4, 7, 9), name="near"),
    Call(300, 300, 64, **_ONE_HEAD, policy="neighborhood(window=50, stride=7)", grid=(300,), low="int8", name="1-D"),
    Call(
        640, 640, 64, **_ONE_HEAD, text=(0, 128), policy="neighborhood(window=8x16)", grid=(16, 32), name="2-D-wide"
    ),
    Call(
        512, 512, 64, **_ONE_HEAD, low="int8", policy="neighborhood(window=8x16, stride=8x16)", grid=(16, 32),
        name="fits",
    ),
    Call(
        320, 320, 64, **_ONE_HEAD, high="bf16", low="int8", text=(0, 20), parts=2, grid=(14, 20),
        policy="neighborhood(window=7x9, high=3x3)", name="2-D-text-in-two-parts",
    ),
    Call(
        300, 300, 64, **_ONE_HEAD, text=(0, 20), policy="diagonal(window=128, sink=0, near=grid)", grid=(14, 20),
        name="nearest",
    ),
    Call(
        575, 575, 64, **_ONE_HEAD, high="bf16", low="int8", text=(0, 15), grid=(14, 40),
        policy="neighborhood(window=5x9, beyond=mean)", name="2-D-means-text",
    ),
    Call(
        468, 468, 40, kv_heads=1, batch=2, masks_keys=True, grid=(4, 9, 13),
        policy="neighborhood(window=1x2x3, high=1x2x2, beyond=mean)", name="3-D-means-key-mask",
    ),
]  # fmt: skip


# Hidden keys, and hidden values, are these multiples of the largest number that the dtype has.
HIDDEN = [(1.0, -1.0), (math.nan, 2.0**-8)]
HIDING_CALLS = [
    replace(call, masks_keys=True, batch=2)
    for call in (
        Call(1, 1, 64, name="hides-1"),
        Call(63, 63, 64, heads=4, window=0, sink=0, dtype=torch.bfloat16, name="hides-63"),
        Call(111, 111, 40, low="int8", window=0, sink=0, has_rope=True, dtype=torch.float16, name="hides-111"),
        Call(300, 300, 64, kv_heads=1, has_rope=True, name="hides-300-rope"),
        Call(300, 300, 64, high="bf16", low="int8", window=0, sink=0, dtype=torch.bfloat16, name="hides-all-low"),
        Call(300, 300, 64, high="bf16", low="int8", sink=0, rotation="none/head_dim", name="hides-rotated-v"),
        Call(300, 300, 64, high="bf16/fp16", low="int8/fp16", sink=0, name="hides-fp16-values"),
        Call(416, 416, 64, low="int8/fp16", window=0, means=2, dtype=torch.bfloat16, name="hides-fp16-means"),
        Call(300, 300, 64, high="bf16", low="fp8", has_token_order=True, has_rope=True, name="hides-order"),
        Call(300, 300, 64, low="fp8", has_token_order=True, empty_slots=40, name="hides-order-empty"),
        Call(300, 300, 64, low="nvfp4", kv_heads=1, dtype=torch.bfloat16, name="hides-nvfp4"),
        Call(130, 300, 72, high="fp8", low="fp8", dtype=torch.float16, name="hides-cross-fp8"),
        Call(300, 300, 64, high="bf16", low="int8", is_causal=True, skip_below=0.05, name="hides-causal-skips"),
        Call(300, 300, 64, kv_heads=1, window=0, sink=0, means=1, name="hides-means"),
        Call(500, 500, 64, low="int8", has_token_order=True, empty_slots=40, means=2, name="hides-order-means"),
        Call(
            400, 400, 64, **_ONE_HEAD, text=(252, 400), masks_text=True, high="bf16", low="int8", grid=(4, 7, 9),
            policy="neighborhood(window=4x7x9, stride=4x7x9)", dtype=torch.bfloat16, name="hides-text",
        ),
    )
]  # fmt: skip


def random_calls(count: int) -> list[Call]:
    """Calls drawn from everything that is allowed, always the same ones."""
    generator = torch.Generator().manual_seed(20)

    def pick(options: list):
        return options[torch.randint(len(options), (), generator=generator)]

    calls = []
    for seed in range(count):
        is_cross = pick([False, False, True])
        q_length = pick([1, 5, 63, 111, 127, 128, 129, 200, 257, 384])
        k_length = pick([1, 63, 128, 129, 257, 300]) if is_cross else q_length
        kv_heads = pick([1, 2])
        calls.append(
            Call(
                q_length, k_length, pick([40, 64, 72, 128]), batch=pick([1, 2]),
                heads=kv_heads * pick([1, 2]), kv_heads=kv_heads, window=pick([0, 128, 384]), sink=pick([0, 128]),
                high=pick(["mxfp8", "mxfp4", "bf16"]),
                low=pick(["mxfp4", "mxfp8", "mxfp8_e5m2", "int8", "fp8", "mxfp6_e2m3"]),
                text=pick([(0, 0), (0, min(k_length, 77))]) if not is_cross else (0, 0),
                is_causal=pick([False, True]), masks_keys=pick([False, False, True]),
                has_rope=pick([False, False, True]),
                dtype=pick([torch.float32, torch.bfloat16, torch.float16]),
                tokens_first=pick([False, True]), seed=seed, name=f"random-{seed}",
            )
        )  # fmt: skip
    return calls
