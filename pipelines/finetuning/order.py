"""The order in which a run sees its examples: a function of the seed and the step, so that nothing else is stored."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


class Order:
    """Batches of examples without end: each epoch has every example once, but for an incomplete batch.

    levels: the noise level of each example. size: examples of a batch. by_level: whether a batch has examples of one
    noise level alone, for models whose precision depends on it.
    """

    def __init__(self, levels: Sequence[float], size: int, seed: int, by_level: bool = False):
        groups: dict[float, list[int]] = defaultdict(list)
        for example, level in enumerate(levels):
            groups[level if by_level else 0.0].append(example)
        self.groups, self.size, self.seed = list(groups.values()), size, seed
        self.per_epoch = sum(max(len(group) // size, 1) for group in self.groups)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __getitem__(self, position: int) -> list[int]:
        """Return the examples of the batch at this position, from 0."""
        epoch, number = divmod(position, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        return self._epoch[1][number].tolist()

    def _batches(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        batches = []
        for group in self.groups:
            shuffled = generator.permutation(group)
            if len(shuffled) < self.size:
                shuffled = np.resize(shuffled, self.size)
            batches += [
                shuffled[i * self.size : (i + 1) * self.size] for i in range(len(shuffled) // self.size)
            ]
        return [batches[i] for i in generator.permutation(len(batches))]
