"""What attention calls cost on a GPU, predicted: nothing here is measured."""

import numpy as np
import torch

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.bench.bound import letter
from dma_diffusers.eval.recordings.measure import high_tiles, is_dense
from dma_diffusers.eval.recordings.store import Recording, Recordings
from dma_diffusers.kernels import lowerings
from dma_diffusers.kernels.instructions import MATRIX_RATES, RATES
from dma_diffusers.kernels.maps import TILE, tiles

TARGETS = tuple(MATRIX_RATES)


def tile_clocks(target: str, head_dim: int, high: str, low: str) -> tuple[float, float]:
    """Clocks of an SM for one pair of tiles in HIGH and in LOW: two products at their peak rates, plus exponentials.

    The sum, not the larger: on an H200 softmax and products hardly overlap. For HIGH over LOW everywhere the sum
    predicts 1.50 at head_dim 128 and 1.33 at 64, where 1.44 and 1.32 were measured (`high` and `low` in
    eval/results/h200_hopper_variants.txt); the larger of the two predicts 2.00 and 1.00.
    Raises ValueError for a target without rates, or formats that no kernel of it multiplies.
    """
    check_target(target)
    chosen = lowerings.choose(target, head_dim, high, low)
    if chosen.lowering == "reference":
        raise ValueError(f"{high}|{low} has no kernel on {target}, head_dim {head_dim}: {chosen.reason}")
    stores = next(lowering.stores for lowering in lowerings.LOWERINGS if lowering.name == chosen.lowering)
    of_high = _clocks(target, head_dim, letter(high, stores), "H")
    return of_high, _clocks(target, head_dim, letter(low, stores), "Q")


def head_clocks(recordings: Recordings, config: DMAConfig, target: str) -> np.ndarray:
    """Predicted clocks of each head, float64 `[modules, steps, heads]`, means over prompts; quantisation left out."""
    modules, steps = recordings.modules, recordings.steps
    heads = max(recording.shape[1] for recording in recordings)
    total = np.zeros((len(modules), len(steps), heads))
    known: dict[tuple, np.ndarray] = {}
    for recording in recordings:
        own, dense = config.of_module(recording.module), is_dense(recordings, recording, config)
        key = (own, dense, recording.layout, recording.shape, recording.is_causal)
        if key not in known:
            arguments = own.arguments(recording.text) | {"mapped": not dense}
            per_high, per_low = tile_clocks(target, recording.shape[3], own.high, own.low)
            high = high_tiles(arguments, recording).sum((-2, -1))[0].expand(recording.shape[1]).numpy()
            low = _pairs(recording) - high
            known[key] = recording.shape[0] * (high * per_high + low * per_low)
        place = modules.index(recording.module), steps.index(recording.step)
        total[place][: recording.shape[1]] += known[key]
    return total / len(recordings.prompts)


def full_precision_clocks(recordings: Recordings, target: str) -> float:
    """Predicted clocks of bf16 attention in all recorded modules, a mean over steps and prompts."""
    total = 0.0
    for recording in recordings:
        batch, heads, _, head_dim = recording.shape
        total += batch * heads * _pairs(recording) * _clocks(target, head_dim, "H", "H")
    return total / len(recordings.prompts) / len(recordings.steps)


def check_target(target: str) -> None:
    """Raises ValueError for an architecture whose rates are not known."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; there are {', '.join(TARGETS)}")


def current_target() -> str:
    """The architecture of this process's GPU if its rates are known, else sm_100."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = lowerings.architecture(device)
    return architecture if architecture in TARGETS else "sm_100"


def _clocks(target: str, head_dim: int, qk: str, pv: str) -> float:
    rates = MATRIX_RATES[target]
    products = 2 * head_dim * (1 / rates[qk] + 1 / rates[pv])
    return TILE * TILE * (products + 1 / RATES[target]["mufu"])


def _pairs(recording: Recording) -> int:
    """How many pairs of tiles a head computes."""
    side = tiles(recording.shape[2])
    return side * (side + 1) // 2 if recording.is_causal else side**2
