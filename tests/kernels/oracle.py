"""An oracle of attention that knows nothing of tiles in a loop."""

import itertools
import math

import torch

from dma_diffusers.kernels.formats import fake_quantize, sign_is_changed
from dma_diffusers.kernels.precision import Precisions
from tests.kernels.calls import Call, seen


def rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Pairs of neighbouring channels as complex numbers, times e^(i·angle)."""
    if rope is None:
        return x
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*rope)
    return torch.view_as_real(turned).flatten(-2)


def hadamard_matrix(rotation: str, head_dim: int) -> torch.Tensor:
    """The rotation in float64: an element of Sylvester's matrix is −1 where row & column has an odd number of bits."""
    block = {"none": 1, "hadamard16": 16, "hadamard32": 32, "head_dim": head_dim}[rotation]
    result = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for row in range(head_dim):
        for column in range(row // block * block, (row // block + 1) * block):
            is_odd = (row & column & (block - 1)).bit_count() % 2 == 1
            result[row, column] = (-1.0 if is_odd else 1.0) * block**-0.5
    signs = [-1.0 if sign_is_changed(channel) and block > 1 else 1.0 for channel in range(head_dim)]
    return torch.tensor(signs, dtype=torch.float64)[:, None] * result


def normalised(x: torch.Tensor, weight: torch.Tensor, first_weight: torch.Tensor, norms) -> torch.Tensor:
    """x behind torch's own RMSNorm, or one that rounds twice; its first tokens behind another one."""
    parts = x.split((norms.first, x.shape[-2] - norms.first), dim=-2)
    weights = (first_weight, weight)
    normal = (
        _normalised_twice_rounded(part, own, norms.eps)
        if norms.rounds_twice
        else torch.nn.functional.rms_norm(part, part.shape[-1:], own, norms.eps)
        for part, own in zip(parts, weights, strict=True)
    )
    return torch.cat(list(normal), dim=-2)


def _normalised_twice_rounded(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x behind RMSNorm, step by step as Diffusers' own takes them."""
    deviation = x.double().square().mean(-1, keepdim=True).add(eps).sqrt().float()
    return (x.float() * (1 / deviation)).to(weight.dtype) * weight


def is_high(call: Call) -> torch.Tensor:
    """Says which pair of slots is HIGH: bool `[Sq, Sk]`."""
    return high_and_mean(call)[0]


def high_and_mean(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Says which pair of slots is HIGH, and which MEAN, one by one, from the words of `Diagonal`: bool `[Sq, Sk]`."""
    q_length, k_length = call.layout.q_length, call.layout.k_length
    high = torch.zeros(q_length, k_length, dtype=torch.bool)
    cut, mean = high.clone(), high.clone()
    text = [token for token in range(k_length) if token % (k_length // call.parts) in range(*call.text)]
    omits_text = text and q_length == k_length - len(text) and not call.is_causal
    places = (
        [token for token in range(k_length) if token not in text] if omits_text else list(range(q_length))
    )
    k_text = {token // 128 for token in text}
    q_text = {i // 128 for i, place in enumerate(places) if place in text}
    own_tiles = [{place // 128 for place in places[i : i + 128]} for i in range(0, q_length, 128)]
    last_whole_tile = k_length // 128
    for i in range(0, q_length, 128):
        for j in range(0, k_length, 128):
            q_tile, k_tile = i // 128, j // 128
            pair = slice(i, i + 128), slice(j, j + 128)
            distance = min(abs(own - k_tile) for own in own_tiles[q_tile])
            sides = 1 if call.is_causal else 2
            in_band = call.window > 0 and 128 * (1 + sides * (distance - 1)) < call.window
            in_band = in_band or (call.window > 0 and distance == 0)
            is_sink = j < call.sink
            is_text = q_tile in q_text or k_tile in k_text
            if call.is_causal and k_tile > q_tile:
                continue
            high[pair] = in_band or is_sink or is_text
            has_empty = call.has_token_order and -1 in call.token_order[j : j + 128].tolist()
            is_diagonal = call.is_causal and k_tile == q_tile
            is_far = call.means == 1 or (call.means > 1 and (q_tile + k_tile) % call.means != 0)
            mean[pair] = is_far and not (in_band or is_sink or is_text or is_diagonal)
            cut[pair] = k_tile >= last_whole_tile or is_diagonal or has_empty
    return (high | cut & ~mean if high.any() else high), mean


def under_shared_scales(x: torch.Tensor, fmt: str, rows: int) -> torch.Tensor:
    """x in int8 or fp8, each run of `rows` rows under its amax, by whose inverse it is multiplied."""
    largest = {"int8": 127.0, "int8_tile": 127.0, "int4": 7.0, "fp8": 448.0}[fmt]
    amax = torch.stack([run.abs().amax((-2, -1)) for run in x.split(rows, dim=-2)], dim=-1)
    scale = torch.where(amax == 0, 1.0, amax / largest).repeat_interleave(rows, -1)[..., : x.shape[-2], None]
    y = x * (1 / scale)
    return (y.round() if fmt != "fp8" else y.clamp(-448, 448).to(torch.float8_e4m3fn).float()) * scale


def without_skipped(call: Call, s: torch.Tensor) -> torch.Tensor:
    """Scores `[B, H, Sq, Sk]`, −inf in every tile that a block of 64 queries skips, walked one by one."""
    s, precision_map = s.clone(), call.map()
    is_query = torch.ones(s.shape[2], dtype=torch.bool) if call.token_order is None else call.token_order >= 0
    for b, h, block in itertools.product(*map(range, s.shape[:2]), range(0, s.shape[2], 64)):
        row = tuple(i % n for i, n in zip((b, h), precision_map.bounds.shape, strict=False))
        own = precision_map.indices[row][block // 128][: precision_map.bounds[row][block // 128, -1]]
        queries = (block + torch.arange(64))[: s.shape[2] - block]
        queries = queries[is_query[queries]]
        largest = torch.full((len(queries),), -math.inf, dtype=s.dtype)
        kept = 0
        for tile in own.tolist():
            scores = s[b, h, queries, 128 * tile : 128 * (tile + 1)]
            top = scores.amax(-1)
            is_looked_at = kept < 16 or kept % 8 == 0
            if is_looked_at and (top < largest + math.log(call.skip_below)).all():
                s[b, h, queries, 128 * tile : 128 * (tile + 1)] = -math.inf
                kept = 0
            else:
                kept += 1
            largest = torch.maximum(largest, top)
    return s


def oracle(call: Call, q, k, v, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64 from quantised scores; probabilities and values are not rounded."""
    q, k, v = (x.cpu() for x in (q, k, v))
    if norms := call.norms():
        q, k = normalised(q, norms.q, norms.q_first, norms), normalised(k, norms.k, norms.k_first, norms)
    q, k, v = (x.float() for x in (q, k, v))
    ropes = call.ropes()
    q, k = rotated(q, ropes["q_rope"]), rotated(k, ropes["k_rope"])
    groups = call.heads // call.kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    sampled = torch.arange(0, call.k_length, max(1, call.k_length // 1024))
    means = []  # any constant will do; this one rounds alike
    for b in range(call.batch):
        own = sampled if mask is None else sampled[mask[b, sampled].cpu()]
        means.append(k[b, :, own].double().sum(-2, keepdim=True) / max(1, len(own)))
    mean = torch.stack(means).float()
    high, low = (precision.qk for precision in Precisions.parse(call.high, call.low))
    in_high, in_mean = high_and_mean(call)
    is_fine = low in ("bf16", "fp8", "int8", "int8_tile", "mxfp8", "mxfp8_e5m2", "mxint8")
    of_means = low if is_fine and call.map().has_low else high
    used = {*call.map().used(high, low), of_means if call.means else None}
    if used <= {"bf16", None} or not call.smooth_k:  # nothing is smoothed
        mean = torch.zeros_like(mean)
    folded = q * (call.head_dim**-0.5 * math.log2(math.e))
    smoothed = k - mean if mask is None else (k - mean).masked_fill(~mask[:, None, :, None].cpu(), 0)

    q, k, v, folded, smoothed = map(call.in_slots, (q, k, v, folded, smoothed))

    channels = hadamard_matrix(call.rotation.split("/")[0], call.head_dim)

    def scores(fmt: str, smoothed: torch.Tensor, in_bf16: torch.Tensor) -> torch.Tensor:
        if fmt == "bf16":
            return (q.bfloat16().double() @ in_bf16.mT) * call.head_dim**-0.5
        folded_and_rotated, smoothed = ((x.double() @ channels).float() for x in (folded, smoothed))
        if fmt in ("int8", "fp8", "int8_tile", "int4"):
            rows = 128 if fmt == "int8_tile" else 1
            a, b = under_shared_scales(folded_and_rotated, fmt, rows), under_shared_scales(smoothed, fmt, 128)
        else:
            amax = (x.abs().amax((-2, -1), keepdim=True) for x in (folded_and_rotated, smoothed))
            a, b = (
                fake_quantize(x, fmt, tensor_amax=t)
                for x, t in zip((folded_and_rotated, smoothed), amax, strict=True)
            )
        return (a.double() @ b.double().mT) * math.log(2)

    in_bf16 = k.bfloat16().double() - mean.double()
    s = torch.where(in_high, scores(high, smoothed, in_bf16), scores(low, smoothed, in_bf16))
    s = s.masked_fill(~seen(call, mask) | in_mean, -math.inf)
    if call.skip_below is not None:
        s = without_skipped(call, s)
    if call.means:  # each sub-tile's mean is one further key, which stands after the others
        shown = call.in_slots(
            torch.ones(1, 1, call.k_length, 1) if mask is None else mask[:, None, :, None].float()
        )
        runs = [slice(i, i + 32) for i in range(0, call.layout.k_length, 32)]
        counts = torch.stack([shown[..., run, :].sum(-2) for run in runs], -2)
        k_means, v_means = (
            torch.stack([(x * shown)[..., run, :].double().sum(-2) for run in runs], -2) / counts.clamp(min=1)
            for x in (smoothed, v)
        )
        of_means = scores(of_means, k_means.float(), k_means.bfloat16().double()) + counts.log().mT
        of_means = of_means.masked_fill(~in_mean[:, ::32], -math.inf)
        s, v = torch.cat((s, of_means), -1), torch.cat((v.double(), v_means), -2)
    s = s + ((q.bfloat16() if "bf16" in used else q).double() @ mean.double().mT) * call.head_dim**-0.5
    lse = s.logsumexp(-1)
    p = torch.where(lse.isinf()[..., None], 0, torch.exp(s - lse[..., None]))
    return call.of_tokens(p @ v.double()), call.of_tokens(lse[..., None])[..., 0]
