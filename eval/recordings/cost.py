"""This module predicts what attention calls cost on a GPU; it measures nothing."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.cost import check_target, clocks_of, clocks_of_pairs, pairs, routing_clocks
from dma_diffusers.eval.recordings.measure import at_noise_of, policy_and_layout
from dma_diffusers.eval.recordings.store import Recording, Recordings
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import TILE, Layout, tiles
from dma_diffusers.kernels.tiling.policies import Policy
from dma_diffusers.kernels.tiling.precision_map import SHARED_ROWS, Class


def head_clocks(recordings: Recordings, config: DMAConfig, target: str) -> np.ndarray:
    """Predict the clocks of each head, float64 `[modules, steps, heads]`, means over prompts, without quantisation."""
    modules, steps = recordings.modules, recordings.steps
    heads = max(recording.shape[1] for recording in recordings)
    total = np.zeros((len(modules), len(steps), heads))
    known: dict[tuple, np.ndarray] = {}
    for recording in recordings:
        own, policy, layout = _asked(recordings, recording, config)
        key = (own, recording.layout, recording.shape, recording.is_causal)
        if policy.skip_below:  # the recording's contents decide what is left out
            key = (*key, recording.file)
        if key not in known:
            visited = pairs(policy, layout, recording.is_causal)
            left_out = 0.0
            if policy.skip_below and (of_low := float(visited.low.mean())):
                # It counts as if LOW alone were left out.
                left_out = _left_out(recordings, recording, policy, layout, own.high, own.low) / of_low
            formats = target, recording.shape[3], own.high, own.low
            clocks = clocks_of_pairs(visited, *formats, left_out=min(left_out, 1.0))
            clocks = clocks + routing_clocks(policy, layout, target, recording.shape[3])
            known[key] = recording.shape[0] * clocks.expand(recording.shape[1]).numpy()
        place = modules.index(recording.module), steps.index(recording.step)
        total[place][: recording.shape[1]] += known[key]
    return total / len(recordings.prompts)


def class_pairs(recordings: Recordings, config: DMAConfig) -> np.ndarray:
    """Count the pairs of tiles of each class, float64 `[modules, steps, 4]` in the order of `Class`.

    They are sums over heads and batch entries, means over prompts. Softmax leaves out none. In tile order, padding may
    bring HIGH, LOW and MEAN over all pairs of the tokens' tiles; SKIP is what is left.
    """
    modules, steps = recordings.modules, recordings.steps
    total = np.zeros((len(modules), len(steps), len(Class)))
    known: dict[tuple, np.ndarray] = {}
    for recording in recordings:
        own, policy, layout = _asked(recordings, recording, config)
        key = (own, recording.layout, recording.shape, recording.is_causal)
        if key not in known:
            taken = [number.mean().item() for number in pairs(policy, layout, recording.is_causal)[:3]]
            skipped = max(_pairs(recording) - sum(taken), 0.0)
            known[key] = recording.shape[0] * recording.shape[1] * np.array([*taken, skipped])
        total[modules.index(recording.module), steps.index(recording.step)] += known[key]
    return total / len(recordings.prompts)


def predicted_cost(
    recordings: Recordings, config: DMAConfig, target: str, ran: Mapping[str, float] | None = None
) -> float | None:
    """Predict attention's clocks in units of bf16 attention's; None for formats that no kernel of `target` multiplies.

    It is 1 where attention is left to stock. Every step of the drawing counts with what the configuration has at its
    noise level. Quantisation, gather and routing by pools are left out.

    Args:
        ran: the share of each module's calls that ran as configured, where that is less than all; the other calls cost
            what bf16 attention does.

    Raises ValueError for an unknown target.
    """
    check_target(target)
    shares = np.array([(ran or {}).get(name, 1.0) for name in recordings.modules])
    if config.lowering == "stock" or not shares.any():
        return 1.0
    try:
        clocks = head_clocks(of_every_step(recordings), config, target).mean(1).sum(-1)
    except ValueError:
        return None
    full = module_clocks(recordings, target).mean(1)
    return float((shares * clocks + (1 - shares) * full).sum() / full.sum())


def of_every_step(recordings: Recordings) -> Recordings:
    """Return an index with every step that was drawn, at its noise level, with the calls of the nearest recorded step.

    An index without the levels of all steps is returned as it is.
    """
    if not recordings.sigmas:
        return recordings
    found = [
        replace(recording, step=step, sigma=sigma)
        for step, sigma in enumerate(recordings.sigmas)
        for nearest in [min(recordings.steps, key=lambda recorded: abs(recorded - step))]
        for recording in recordings
        if recording.step == nearest
    ]
    return replace(recordings, recordings=found)


def full_precision_clocks(recordings: Recordings, target: str) -> float:
    """Predict the clocks of bf16 attention in all recorded modules, a mean over steps and prompts."""
    return float(module_clocks(recordings, target).mean(1).sum())


def module_clocks(recordings: Recordings, target: str) -> np.ndarray:
    """Predict the clocks of bf16 attention in each module, float64 `[modules, steps]`, means over prompts."""
    modules, steps = recordings.modules, recordings.steps
    total = np.zeros((len(modules), len(steps)))
    for recording in recordings:
        batch, heads, _, head_dim = recording.shape
        place = modules.index(recording.module), steps.index(recording.step)
        total[place] += batch * heads * _pairs(recording) * sum(clocks_of(target, head_dim, "H", "H"))
    return total / len(recordings.prompts)


def _asked(
    recordings: Recordings, recording: Recording, config: DMAConfig
) -> tuple[DMAConfig, Policy, Layout]:
    """Return what a call runs with: its own configuration, the policy, and the layout that it is followed on."""
    own = at_noise_of(recordings, recording, config)
    return own, *policy_and_layout(own.arguments(recording.text, own.grid or recording.grid), recording)


def _pairs(recording: Recording) -> int:
    """Count the pairs of tiles that a head computes."""
    side = tiles(recording.shape[2])
    return side * (side + 1) // 2 if recording.is_causal else side**2


def _left_out(
    recordings: Recordings, recording: Recording, policy: Policy, layout: Layout, high: str, low: str
) -> float:
    """Count the pairs of tiles that a head leaves out by its softmax, a mean over heads and batch entries."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v, mask = (x if x is None else x.to(device) for x in recordings.tensors(recording))
    made = plan.make(policy, layout, recording.is_causal).to(device)
    skipped = torch.zeros(q.shape[:2], dtype=torch.int32, device=device)
    call = Call(q, k, v, mask, recording.scale, recording.is_causal)
    reference.attention(call, made, Precisions.parse(high, low), skip_rows=TILE, skipped=skipped)
    return float(skipped.double().mean()) * SHARED_ROWS / TILE  # the reference counts in blocks of 64 queries
