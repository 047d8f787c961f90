"""The formats that each architecture multiplies fastest: the one table that presets, benchmarks and tools read."""

from dma_diffusers.kernels.lowerings import WITHOUT_FP8

_BLOCK_SCALED = (("mxfp8", "mxfp4"), ("mxfp8", "nvfp4"))
_PLAIN = (("bf16", "int8"), ("bf16", "fp8"))
_HALF = (("bf16", "int8/fp16"),)  # SageAttention's pair
_WITHOUT_FP8 = (("bf16", "int8/bf16"), *_HALF)

FORMAT_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "sm_100": _BLOCK_SCALED,
    "sm_103": _BLOCK_SCALED,
    "sm_120": _BLOCK_SCALED,
    "sm_90": _PLAIN,
    "sm_89": (*_PLAIN, *_HALF),
    **dict.fromkeys(WITHOUT_FP8, _WITHOUT_FP8),
}
"""For each architecture, the pairs of words (HIGH, LOW) that its own MMAs multiply; the first is the default."""


def default_formats(architecture: str) -> tuple[str, str]:
    """The words of HIGH and LOW to take on `architecture`; those of a B200 where it is not in the table."""
    return FORMAT_PAIRS.get(architecture, _BLOCK_SCALED)[0]


DEFAULT_POLICIES: dict[str, str] = {"sm_90": "dense(everywhere=low)"}
"""The policy's words where LOW is nearly exact (int8: eval/results/quality.md), so that HIGH tiles gain little."""
