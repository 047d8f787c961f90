"""What attention calls cost on a GPU, predicted: nothing here is measured."""

import numpy as np

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.cost import clocks_of, pairs, tile_clocks
from dma_diffusers.eval.recordings.measure import asked, is_dense
from dma_diffusers.eval.recordings.store import Recording, Recordings
from dma_diffusers.kernels.maps import tiles


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
            arguments = own.arguments(recording.text, recording.grid) | {"mapped": not dense}
            visited = pairs(*asked(arguments, recording), recording.is_causal)
            per_high, per_low = tile_clocks(target, recording.shape[3], own.high, own.low)
            clocks = visited.high * per_high + visited.low * per_low
            known[key] = recording.shape[0] * clocks.expand(recording.shape[1]).numpy()
        place = modules.index(recording.module), steps.index(recording.step)
        total[place][: recording.shape[1]] += known[key]
    return total / len(recordings.prompts)


def full_precision_clocks(recordings: Recordings, target: str) -> float:
    """Predicted clocks of bf16 attention in all recorded modules, a mean over steps and prompts."""
    total = 0.0
    for recording in recordings:
        batch, heads, _, head_dim = recording.shape
        total += batch * heads * _pairs(recording) * sum(clocks_of(target, head_dim, "H", "H"))
    return total / len(recordings.prompts) / len(recordings.steps)


def _pairs(recording: Recording) -> int:
    """How many pairs of tiles a head computes."""
    side = tiles(recording.shape[2])
    return side * (side + 1) // 2 if recording.is_causal else side**2
