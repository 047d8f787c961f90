"""The calls that were measured to be faster than stock attention, which are those that the preset `auto` takes."""

import torch

from dma_diffusers.kernels import lowerings
from dma_diffusers.kernels.defaults import default_formats

# The shortest calls, in keys, that were faster than stock attention when they were measured, quantisation included, in
# the default formats of the architecture (eval/results/h200_bench.json.gz). Shorter ones weren't, or weren't measured.
GAINS_FROM: dict[tuple[str, int | None], int] = {("sm_90", 64): 17_664, ("sm_90", 128): 16_384}
# The same where every tile is LOW: whole steps were, and single calls (h200_pipeline_flux_1k.json and
# h200_attention_fa3.json in eval/results).
LOW_GAINS_FROM: dict[tuple[str, int | None], int] = {("sm_90", 128): 4_608}
# Where that holds for calls with keys of the text masked, too (eval/results/h200_masked.txt).
GAINS_WITH_MASKED_TEXT = {("sm_90", 128)}


@torch.compiler.assume_constant_result  # a graph cannot ask a device what it is
def why_not_faster(device: torch.device, head_dim: int, high: str, low: str, masked: str) -> str:
    """The reason for which such calls are not known to be faster than stock on `device`; empty if they are.

    high, low: the shortest words of the precisions. masked: "text" if keys of the text alone are masked, "keys" if any
    may be, empty for none.
    """
    if head_dim > lowerings.MAX_HEAD_DIM:
        return f"head_dim {head_dim} is more than {lowerings.MAX_HEAD_DIM}"
    architecture = lowerings.architecture(device)
    choice = lowerings.choose(architecture, head_dim, high, low)
    if choice.lowering == "reference":
        return f"nothing is faster than stock: {choice.reason}"
    if choice.lowering == "native" and architecture in lowerings.BLOCK_SCALED_ARCHITECTURES:
        return ""
    measured = (architecture, _measured_head_dim(head_dim))
    gains = measured in GAINS_FROM and default_formats(architecture) == (high, low)
    if gains and (not masked or (masked == "text" and measured in GAINS_WITH_MASKED_TEXT)):
        return ""
    formats = f"{high}|{low} ({choice.lowering}) at head_dim {head_dim}"
    if masked:
        formats += f" with masked {masked}"
    where = "" if architecture in lowerings.RUN else ", where nobody has run it: it was compiled"
    return f"{formats} is not shown to be faster than stock on {architecture}{where}"


@torch.compiler.assume_constant_result
def gains_from(device: torch.device, head_dim: int, is_low: bool = False) -> int:
    """The number of keys from which calls on `device` are faster; 0 if no length is known to be too short.

    is_low: whether every tile is LOW.
    """
    measured = (lowerings.architecture(device), _measured_head_dim(head_dim))
    lengths = GAINS_FROM | LOW_GAINS_FROM if is_low else GAINS_FROM
    return lengths.get(measured, 0)


def _measured_head_dim(head_dim: int) -> int | None:
    """The measured head dimension that calls with `head_dim` are padded to; None if it is larger than all."""
    return next((dim for dim in (64, 128) if head_dim <= dim), None)
