"""Whole calls drawn by Hypothesis: the fused kernel gives what the reference gives, and touches nothing else.

FUZZ_CALLS calls in all (600 by default), always the same ones; another FUZZ_SEED draws others. They are spread over
SHARDS tests, for `pytest -n` (pytest-xdist). A failure prints the smallest call found that still fails.
FUZZ_FORMATS="bf16|int8" draws calls of this pair alone, and on a GPU among fewer kernels, for fewer minutes.
"""

import itertools
import math
import os
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.attention.tuning import tuning
from dma_diffusers.kernels.formats import get_format, rotate
from dma_diffusers.kernels.lowerings import (
    BLOCK_SCALED_ARCHITECTURES,
    FAITHFUL,
    NATIVE,
    TCGEN05_ARCHITECTURES,
    Storage,
    architecture,
    choose,
)
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import MEANS_BITS, Precisions
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.tiling.layout import TILE, tiles
from dma_diffusers.kernels.tiling.policies import Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class, PrecisionMap, build_map, means_of
from tests.kernels.calls import Call, as_the_kernel, by_reference, launched, seen, split
from tests.kernels.guarded import guarded
from tests.kernels.lse_bounds import lse_bounds

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned")]

SHARDS = 20
CALLS = int(os.environ.get("FUZZ_CALLS", "600"))
SEED = os.environ.get("FUZZ_SEED", "0")
FORMATS = tuple(os.environ.get("FUZZ_FORMATS", "").split("|"))
IS_ONE_PAIR = len(FORMATS) == 2
# An output that is smaller than this, in units of its channels, may be lost: beside a key of probability 1 whose value
# is zero, the other probabilities can be too small for float32.
LOST = 2.0**-100
COMBINATIONS = 48 if IS_ONE_PAIR else 200  # that a GPU compiles kernels for, at seconds each

STORES = {"native": NATIVE, "faithful": FAITHFUL}
EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257]
LONG_EDGES = [*EDGES, 384, 511, 513, 897, 1024, 1281, 1500]
HEAD_DIMS = [40, 64, 72, 96, 128]


def rows(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One row in ten."""
    return torch.rand(x.shape[:3], generator=generator)[..., None] < 0.1


def channels(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One channel in ten."""
    return torch.rand(x.shape[-1], generator=generator) < 0.1


CONTENTS = {
    "ordinary": lambda x, _: x,
    "tiny": lambda x, _: x * 2.0**-10,
    "large": lambda x, _: x * 2.0**10,
    "zeros": lambda x, _: x * 0.0,
    "zero rows": lambda x, generator: x.masked_fill(rows(x, generator), 0.0),
    "huge rows": lambda x, generator: torch.where(rows(x, generator), 32.0 * x, x),
    "outlier channels": lambda x, generator: torch.where(channels(x, generator), 32.0 * x, x),
    "constant added": lambda x, generator: x + 8 * torch.randn(x.shape[-1], generator=generator),
    "few bits": lambda x, _: (4 * x).round() / 4,
}
# Never both large: of scores in the thousands float32 loses thousandths, and of their probabilities as much.
CONTENTS_OF_Q_AND_K = [
    ("ordinary", "ordinary"), ("ordinary", "constant added"), ("ordinary", "outlier channels"),
    ("ordinary", "huge rows"), ("ordinary", "zero rows"), ("ordinary", "few bits"), ("ordinary", "zeros"),
    ("huge rows", "ordinary"), ("outlier channels", "ordinary"), ("zero rows", "constant added"),
    ("few bits", "few bits"), ("tiny", "ordinary"), ("tiny", "tiny"), ("tiny", "large"), ("zeros", "ordinary"),
]  # fmt: skip
MAPS = [
    (), ("HIGH", "LOW", "SKIP"), ("HIGH", "LOW"), ("LOW", "SKIP"), ("HIGH", "SKIP"), ("HIGH",), ("LOW",),
    ("HIGH", "LOW", "MEAN"), ("LOW", "MEAN", "SKIP"), ("HIGH", "MEAN"), ("MEAN",), ("HIGH", "LOW", "MEAN", "SKIP"),
]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Drawn(Call):
    """A call, and how it is run.

    among: of which classes each pair of tiles gets one at random; empty for the Diagonal policy.
    by_batch, by_head: whether such a map differs between them.
    used: whether the map claims HIGH, LOW and MEAN tiles, which kernels are compiled for; None for the truth.
    memory: how q, k and v lie in larger tensors of NaN.
    keys: where `masks_keys`, which ones are seen.
    hidden: the hidden ones' k and v, as a share of their dtype's largest number; None for numbers like the others'.
    target: the architecture whose tuning is used.
    """

    lowering: str = "native"
    target: str | None = None
    among: tuple[str, ...] = ()
    by_batch: bool = False
    by_head: bool = False
    used: tuple[bool, bool, bool] | None = None
    memory: str = "heads first"
    contents: tuple[str, str, str] = ("ordinary", "ordinary", "ordinary")
    keys: str = "random"
    hidden: float | None = None
    interleaves_rope: bool = False
    scale: float | None = None
    returns_lse: bool = True

    def __repr__(self) -> str:
        """The options that differ from a Call's defaults."""
        options = [
            f"{field.name}={value!r}"
            for field in fields(self)[3:]
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"Drawn({', '.join([str(self.q_length), str(self.k_length), str(self.head_dim), *options])})"

    def classes(self) -> torch.Tensor:
        if not self.among:
            return Diagonal(self.window, self.sink).classes(self.layout, self.is_causal)
        shape = (
            self.batch if self.by_batch else 1, self.heads if self.by_head else 1,
            tiles(self.layout.q_length), tiles(self.layout.k_length),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(self.seed)
        among = torch.tensor([Class[name] for name in self.among])
        return among[torch.randint(len(among), shape, generator=generator)]

    def map(self) -> PrecisionMap:
        precision_map = build_map(self.classes(), self.layout, self.is_causal, self.token_order)
        if self.used is None:
            return precision_map
        high, low, mean = self.used
        means = precision_map.means
        if mean and means is None:
            means = means_of(torch.zeros(*precision_map.bounds.shape[:3], tiles(self.layout.k_length)) > 0)
        return replace(precision_map, has_high=high, has_low=low, means=means)

    def sees_nothing(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Says which rows see no key: bool `[B or 1, H or 1, Sq]`."""
        visited = (self.classes() != Class.SKIP).repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)
        visited = visited[..., : self.layout.q_length, : self.layout.k_length]
        return ~self.of_tokens((visited & seen(self, mask)).any(-1, keepdim=True))[..., 0]

    def tensors(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed)

        def random(heads: int, length: int, contents: str) -> torch.Tensor:
            shape = (self.batch, heads, length, self.head_dim)
            x = CONTENTS[contents](torch.randn(shape, generator=generator), generator)
            view = self.view_of_nan(shape, device)
            return view.copy_(x)

        q = random(self.heads, self.q_length, self.contents[0])
        k, v = (random(self.kv_heads, self.k_length, contents) for contents in self.contents[1:])
        mask = None
        if self.masks_keys:
            mask = torch.ones(self.batch, self.k_length + 2, dtype=torch.bool)[:, 1:-1]
            match self.keys:
                case "random":
                    mask &= torch.rand(mask.shape, generator=generator) > 0.3
                case "first":
                    mask[:, 1:] = False
                case "none of the first batch":
                    mask[0] = False
            mask = mask.to(device)
            if self.hidden is not None:
                for x in (k, v):
                    x.masked_fill_(~mask[:, None, :, None], self.hidden * torch.finfo(self.dtype).max)
            if self.memory == "tokens first":
                mask = mask.t().contiguous().t()
        return q, k, v, mask

    def view_of_nan(self, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
        """`shape` within a larger tensor, as models hand it over."""
        batch, heads, length, head_dim = shape

        def nan(*larger: int) -> torch.Tensor:
            return torch.full(larger, torch.nan, dtype=self.dtype, device=device)

        match self.memory:
            case "heads first":
                return nan(batch, heads, length + 2, head_dim)[:, :, 1:-1]
            case "tokens first":
                return nan(batch, length + 2, heads, head_dim)[:, 1:-1].transpose(1, 2)
            case "fused":
                return nan(batch, length, 3 * heads, head_dim)[:, :, heads : 2 * heads].transpose(1, 2)
            case "unaligned":
                return nan(math.prod(shape) + 2)[1:-1].view(shape)

    def ropes(self, device: torch.device | str = "cpu") -> dict:
        ropes = super().ropes(device)
        if self.has_rope and self.interleaves_rope:
            ropes = {name: (cos, torch.stack((sin, cos), -1)[..., 0]) for name, (cos, sin) in ropes.items()}
        return ropes


def constants(random: Random, arch: str) -> dict:
    """The constants for which the kernels of a call are compiled."""
    pick = random.choice
    on_gpu = arch != "cpu"
    lowering = pick(list(STORES))
    kv_heads = pick([1, 1, 2])
    has_rope = pick([False, False, True])
    among = pick(MAPS)
    is_causal = pick([False, True])
    has_low = "LOW" in among or not among or ("MEAN" in among and is_causal)  # on the diagonal
    used = ("HIGH" in among or not among, has_low, "MEAN" in among)
    drawn = {
        "head_dim": pick(pick([HEAD_DIMS] * 9 + [range(8, 129, 4)] * 4 + [range(132, 257, 4)])),
        "heads": kv_heads * pick([1, 1, 2, 3, 4] if kv_heads == 1 else [1, 2]), "kv_heads": kv_heads,
        "high": pick(list(STORES[lowering])), "lowering": lowering,
        "low": pick(list(STORES[lowering])) + pick(["", "", "", "/fp16", "/bf16"]),
        "target": None if on_gpu else pick([None, "sm_90", "sm_100", "sm_120"]),
        "among": among, "used": used if on_gpu else None,
        "is_causal": is_causal,
        "masks_keys": pick([False, False, True]),
        "skip_below": pick([None, None, 2.0**-14]),
        "has_rope": has_rope, "interleaves_rope": has_rope and pick([False, True]),
        "dtype": pick([torch.float32, torch.bfloat16, torch.float16]),
        "memory": pick(["heads first", "tokens first", "fused", "unaligned"]),
        "returns_lse": pick([True, True, False]),
    }  # fmt: skip
    if IS_ONE_PAIR:  # what differs no more would only make more kernels of the same kind
        drawn |= {
            "high": FORMATS[0], "low": FORMATS[1], "head_dim": pick([64, 128]), "heads": pick([2, 4]), "kv_heads": 2,
            "dtype": torch.bfloat16, "memory": "tokens first",
            "lowering": choose(arch, 128, *FORMATS).lowering if on_gpu else "native",
        }  # fmt: skip
    if not drawn["is_causal"]:
        drawn["has_token_order"] = pick([False, False, True])
        drawn["empty_slots"] = pick([0, 37]) if drawn["has_token_order"] else 0
    drawn["smooth_k"], drawn["smooth_v"] = pick([True, True, False]), pick([True, True, False])
    drawn["rotation"] = pick(["none", "none", *fitting_rotations(drawn["head_dim"])])
    return drawn


def fitting_rotations(head_dim: int) -> list[str]:
    return [name for name, block in (("hadamard16", 16), ("hadamard32", 32)) if head_dim % block == 0] + [
        "head_dim"
    ] * (head_dim.bit_count() == 1)


def triton_gets_it_wrong(drawn: dict, arch: str) -> bool:
    """`skip_what_triton_gets_wrong` of test_attention_kernel.py, of constants."""
    if drawn["lowering"] != "native" or arch in ("cpu", *BLOCK_SCALED_ARCHITECTURES):
        return False
    high, low, mean = drawn["used"]
    has_high = high or (mean and not (low and get_format(drawn["low"]).bits >= MEANS_BITS))
    blocks = [
        drawn[name]
        for name, used in (("high", has_high), ("low", low))
        if used and NATIVE[drawn[name]] is Storage.BLOCK
    ]
    is_128 = 64 < drawn["head_dim"] <= 128
    return bool(blocks) and ("nvfp4" in blocks or not high or is_128)


@lru_cache
def combinations(arch: str) -> list[dict]:
    """The constants of every call on a GPU: always the same ones."""
    drawn = (constants(Random(number), arch) for number in itertools.count())
    return list(itertools.islice((d for d in drawn if not triton_gets_it_wrong(d, arch)), COMBINATIONS))


def drawn_call(random: Random, arch: str) -> Drawn:
    """A call that is quick enough where it runs."""
    pick = random.choice
    on_gpu = arch != "cpu"
    fixed = pick(combinations(arch)) if on_gpu else constants(random, arch)
    batch = pick([1, 2]) if fixed["heads"] <= 2 or on_gpu else 1
    # The interpreter takes a twentieth of a second for each pair of tiles and head.
    pairs = 144 if on_gpu else {1: 9, 2: 4, 3: 2, 4: 2}[batch * fixed["heads"]]

    def length(most_tiles: int) -> int:
        most = min(TILE * most_tiles, 1500 if on_gpu else 384)
        edges = [edge for edge in (LONG_EDGES if on_gpu else EDGES) if edge <= most]
        return pick([pick(edges), random.randint(1, most)])

    is_cross = not fixed.get("has_token_order") and pick([False, True])
    q_length = length(pairs if is_cross else math.isqrt(pairs))
    k_length = length(pairs // tiles(q_length)) if is_cross else q_length
    drawn = {
        "contents": (*pick(CONTENTS_OF_Q_AND_K), pick(list(CONTENTS))),
        "scale": pick([None, None, 0.02, 1.0]),
    }
    if fixed["masks_keys"]:
        drawn["keys"] = pick(["random", "first", "none of the first batch"])
        drawn["hidden"] = pick([None, 2.0**-8, -1.0])
    if not fixed["among"]:
        drawn |= {"window": pick([0, 128, 384]), "sink": pick([0, 128])}
        drawn["text"] = pick([(0, 0), (0, min(k_length, 77))])
    elif len(fixed["among"]) > 1:
        drawn |= {"by_batch": pick([False, True]), "by_head": pick([False, True])}
    return Drawn(q_length, k_length, batch=batch, seed=random.randrange(2**32), **fixed, **drawn)


def calls(arch: str) -> st.SearchStrategy[Drawn]:
    """Choices come from one random number generator: of many strategies, Hypothesis would vary each call six times."""
    return st.randoms(use_true_random=False).map(lambda random: drawn_call(random, arch))


def is_split(call: Drawn, device: torch.device) -> bool:
    """Says whether the kernel may walk the keys of some queries in pieces (hopper_split.py)."""
    return (
        architecture(device) == "sm_90"
        and 64 < call.head_dim <= 128
        and call.map().has_high != call.map().has_low
        and not call.is_causal
        and call.skip_below is None
    )


def scores_tolerance(call: Drawn, q, k, inexact_rows, device: torch.device) -> torch.Tensor:
    """How far a score in base 2 may be off, `[B, H, Sq]`, and so a probability, relatively.

    A sum of products loses a share of the sum of their magnitudes: in float32, by its order, up to 3.4·2^-24 as
    seen in the interpreter. On Hopper FP8 MMA adds 32 products to a sum at a time and cuts each 13 bits below the
    largest of them, which may be a single product or, at the end, the score itself.
    """
    from dma_diffusers.kernels.quantiser.operands import padded_dim

    ropes = call.ropes(device)
    keys = quantiser.rotate(k, ropes["k_rope"]).repeat_interleave(call.heads // call.kv_heads, 1)
    turned, keys = (rotate(x, call.rotation) for x in (quantiser.rotate(q, ropes["q_rope"]), keys))
    reach = (turned.abs() @ keys.abs().mT).amax(-1)
    reach *= (call.head_dim**-0.5 if call.scale is None else call.scale) * math.log2(math.e)
    precisions = Plan(call.map()).used(Precisions.parse(call.high, call.low))
    formats = [precision and precision.qk for precision in precisions]
    classes = [name and STORES[call.lowering][name] for name in formats]
    lost, absolute = 2**-21, 2**-19
    if device.type == "cuda":
        e4m3_storages = (Storage.ROW, Storage.TILE)
        is_e4m3 = any(c in e4m3_storages and name != "int8" for c, name in zip(classes, formats, strict=True))
        is_short = is_e4m3 and architecture(device) not in BLOCK_SCALED_ARCHITECTURES
        lost, absolute = 2**-18, 2**-13
        if is_short:
            dim = padded_dim(call.head_dim)
            product = (turned.abs() * keys.abs().amax(-2, keepdim=True)).amax(-1)
            largest = product + (turned @ keys.mT).abs().amax(-1)
            scale = call.head_dim**-0.5 if call.scale is None else call.scale
            absolute = absolute + dim * 33 / 32 * 2**-13 * largest * scale * math.log2(math.e)
    if inexact_rows is not None and inexact_rows.item():
        lost += 2**-17  # elements below e4m3's smallest step, in a row whose largest is near 448
    tuned = tuning(call.target or architecture(device), padded_dim(call.head_dim), tuple(classes[:2]))
    if tuned.exp_share:
        absolute += 2e-4  # polynomial_exp2 is within 7.5e-5, in base 2 1.1e-4
    return lost * reach + absolute


def means_tolerance(*positional, **given) -> torch.Tensor | float:
    """How far the scores of MEAN tiles may be off besides in hopper.py, where they are int8, `[B, H, Sq]`.

    It adds the logarithm of a count in whole products, and multiplies these by no less than 2^-25.
    """
    call, plan, precisions, _ = split(*positional, **given)
    of_means = plan.used(precisions)[2]
    if of_means is None or not of_means.qk.startswith("int8"):
        return 0.0
    slots = reference.Slots.of(call, plan, precisions)
    operands, _ = slots.means(of_means)
    batch, heads, length, dim = slots.q.shape
    q = operands.q.view(batch, heads, -1, 1, dim)[:, :, :length]
    k = operands.k.view(batch, slots.k.shape[1], 1, -1, TILE, dim).repeat_interleave(
        heads // slots.k.shape[1], 1
    )
    unit = q.abs().amax(-1) * k.abs().amax((-2, -1)) / 127**2
    largest = torch.stack([(q * k[..., number, :]).sum(-1).abs() for number in range(TILE)]).amax(0)
    factor = unit.clamp(min=2**-25)
    return slots.of_tokens((factor + largest * torch.where(unit > 0, factor / unit - 1, 0)).amax(-1))


def row_errors(out, reference_out, v_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of each row's error, and the norm to compare it with: its own and that of its head's rows, and LOST.

    Each channel counts in units of its largest value, so that outliers don't drown the others.
    """
    unit = v_scale.repeat_interleave(out.shape[1] // v_scale.shape[1], 1).double()
    size = (reference_out / unit).norm(dim=-1) + LOST
    size = size + size.square().mean(-1, keepdim=True).sqrt()
    return ((out.double() - reference_out.double()) / unit).norm(dim=-1), size


def assert_agree(call: Drawn, device: torch.device) -> None:
    q, k, v, mask = call.tensors(device)
    scale = call.head_dim**-0.5 if call.scale is None else call.scale
    ropes = call.ropes(device)
    positional = (q, k, v, call.map().to(device), call.high, call.low)
    shared = {
        "key_mask": mask,
        "scale": scale,
        "is_causal": call.is_causal,
        "token_order": call.token_order_on(device),
        "fine_mask": call.fine_mask_on(device),
        "skip_below": call.skip_below,
        **call.prepared,
        **ropes,
    }
    of_kernel = as_the_kernel(call, call.lowering, device, call.target)
    reference_out, reference_lse = by_reference(*positional, **shared, **of_kernel)
    out, lse, inexact_rows = launched(
        *positional, **shared,
        lowering=call.lowering, return_lse=call.returns_lse, target=call.target, run=guarded,
    )  # fmt: skip

    assert out.shape == reference_out.shape and out.dtype == reference_out.dtype
    assert (lse is not None) == call.returns_lse
    nothing = call.sees_nothing(mask).to(device).expand(reference_lse.shape)
    assert torch.equal(reference_lse == -torch.inf, nothing)
    assert (out[nothing] == 0).all()
    if call.returns_lse:
        assert lse.shape == reference_lse.shape and lse.dtype == torch.float32
        assert torch.equal(lse == -torch.inf, nothing)
    if nothing.all():
        return
    seen_k = k if mask is None else k.masked_fill(~mask[:, None, :, None], 0)
    tolerance = scores_tolerance(call, q, seen_k, inexact_rows, device)
    if of_kernel["means_by_codes"]:
        tolerance += means_tolerance(*positional, **shared)
    if call.skip_below is not None:  # a tile on the threshold may be skipped by one of them alone
        tolerance += TILE * call.skip_below
    if call.returns_lse:
        slack = 2 * tolerance[~nothing].max().item()  # a score's and its row's maximum's
        least, largest = lse_bounds(slack, *positional, **shared, **of_kernel)
        beyond = torch.maximum(lse - largest, least - lse)[~nothing]
        # hopper.py's sums of FP8 probabilities are products of its MMA. Its sums begin anew in each piece of the keys,
        # under whose largest score the piece's probabilities are rounded.
        step = 2**-4 if of_kernel["means_by_codes"] and call.map().has_low else 2**-8 * is_split(call, device)
        assert (beyond <= tolerance[~nothing] + step).all()
        assert (beyond <= tolerance[~nothing] + step / 16).float().mean() >= 0.5
    error, size = row_errors(out, reference_out, quantiser.value_units(v, mask, False).scale)
    # Rounding: a last output bit, and in few rows a probability that falls to the neighbouring e4m3 or bf16 number.
    tolerance += torch.finfo(call.dtype).eps / 4 + (2e-3 if device.type == "cuda" else 0)
    if device.type == "cuda" and call.map().has_low and architecture(device) not in TCGEN05_ARCHITECTURES:
        tolerance += 1e-2  # of V that hardly varies, FP8 MMA loses up to 2^-13·32·(1 + 2 + 3 + 4)/4 in a tile
    one_step = 2**-4 if call.map().has_low else 2**-8
    assert (error <= (tolerance + one_step) * size)[~nothing].all()
    if (~nothing).sum() >= 16:
        if is_split(call, device):  # probabilities round under the largest so far of a piece of the keys
            tolerance += one_step / 2
        assert (error <= tolerance * size)[~nothing].float().mean() >= 0.5


@pytest.mark.parametrize("shard", range(SHARDS))
def test_calls(shard, kernel_device):
    @seed(f"{SEED}-{shard}")
    @settings(
        max_examples=-(-CALLS // SHARDS), deadline=None, database=None, report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(calls(architecture(kernel_device)))
    def search(drawn):
        assert_agree(drawn, kernel_device)

    search()
