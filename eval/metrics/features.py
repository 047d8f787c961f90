"""FID and KID are computed from the moments of any number of features, and from a bounded sample of them."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import torch

Key = tuple[str, int]  # it holds a prompt and the number of its picture
_SAMPLE = 10_000


class FeatureSet:
    """This holds features of a set of pictures, in memory that does not grow with their number.

    `count`, `mean` and `covariance` are those of all pictures, in float64. `features` and `keys` are a sample of at
    most 10,000 pictures, those whose prompts' hashes are lowest. So neither order nor batches change it, all prompts
    but the last stay whole, and sets drawn from the same prompts keep the same ones.
    """

    def __init__(self, sample: int = _SAMPLE) -> None:
        self.count = 0
        self._sample = sample
        self._sum: torch.Tensor | float = 0.0
        self._products: torch.Tensor | float = 0.0
        self._keys: list[Key] = []
        self._features: list[torch.Tensor] = []
        self._pending: list[Key] = []

    def update(self, features: torch.Tensor, keys: Sequence[Key]) -> None:
        """Add the [B, D] features of pictures whose keys are (prompt, number), each given once.

        Raises ValueError where features and keys differ in number.
        """
        if len(features) != len(keys):
            raise ValueError(f"{len(features)} features for {len(keys)} keys: each picture has one of each")
        exact = features.double()
        self.count += len(keys)
        self._sum = self._sum + exact.sum(0)
        self._products = self._products + exact.T @ exact
        self._features.append(features)
        self._pending += keys
        if len(self._pending) > self._sample:
            self._compact()

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean, [D] float64."""
        return self._sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Return the unbiased covariance, [D, D] float64, of at least 2 pictures."""
        return (self._products - self.count * self.mean.outer(self.mean)) / (self.count - 1)

    @property
    def features(self) -> torch.Tensor:
        """Return the features of the sample, [n, D]."""
        self._compact()
        return self._features[0]

    @property
    def keys(self) -> list[Key]:
        """Return the sample's keys, in the order of `features`."""
        self._compact()
        return self._keys

    @property
    def prompts(self) -> list[str]:
        """Return the sample's prompts, in the order of their hashes."""
        return list(dict.fromkeys(prompt for prompt, _ in self.keys))

    def groups(self, most: int) -> torch.Tensor:
        """Cut the prompts into at most `most` groups, and return the group of each picture of the sample, [n] int64."""
        numbers = {prompt: number % most for number, prompt in enumerate(self.prompts)}
        return torch.tensor([numbers[prompt] for prompt, _ in self.keys], device=self.features.device)

    def _compact(self) -> None:
        if not self._pending:
            return
        keys = self._keys + self._pending
        ranks = [_rank(key) for key in keys]
        order = sorted(range(len(keys)), key=ranks.__getitem__)[: self._sample]
        self._keys, self._pending = [keys[at] for at in order], []
        for key, following in pairwise(self._keys):
            if key == following:
                raise ValueError(f"picture {key[1]} of {key[0]!r} was given twice")
        self._features = [torch.cat(self._features)[order]]


def require_pictures(name: str, *sets: FeatureSet) -> None:
    """Raise ValueError where a set has fewer than the 2 pictures that a variance needs."""
    if min(each.count for each in sets) < 2:
        counts = " and ".join(str(each.count) for each in sets)
        raise ValueError(f"{name} needs at least 2 pictures in each set: there are {counts}")


def _rank(key: Key) -> tuple[int, int]:
    prompt, number = key
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest()), number
