"""Random numbers of a seed: Philox 4×32 with ten rounds, bit for bit those of Triton's `tl.randint4x`.

The low word of the key is the seed, its high word the stream, the counter the number of four neighbouring words.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_SAMPLES = 256


def seed_of(gradient: Tensor, seed: int) -> Tensor:
    """The seed of one backward pass, int64 `[1]` from 0 to 2^32 − 1, on the gradient's device, without waiting for it.

    It is a hash of up to 256 numbers of the gradient, and of `seed`. So it needs no state: another step has another
    seed, and a pass that is computed again, under gradient checkpointing, has the same one.
    """
    numbers = gradient.detach().reshape(-1)
    # Widths are even, so that an odd step meets all channels, and not one that may have no gradient.
    numbers = numbers[:: numbers.numel() // _SAMPLES | 1][:_SAMPLES].float()
    places = torch.arange(1, len(numbers) + 1, device=gradient.device) * _STEPS[0]
    mixed = (numbers.view(torch.int32).long() & _WORD) ^ (places & _WORD)
    # MurmurHash3's finalizer: bfloat16 numbers differ in few bits, which one multiplication would not spread.
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & _WORD
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & _WORD
    mixed = mixed ^ mixed >> 16
    total = mixed.sum(0, keepdim=True) + (seed & _WORD) * _STEPS[1] & _WORD
    return (total ^ total >> 16) & _WORD


def words(seed: Tensor, stream: int, count: int) -> Tensor:
    """The first `count` words of a stream, int64 `[count]` from 0 to 2^32 − 1. seed: int64 `[1]`."""
    counter = torch.arange((count + 3) // 4, device=seed.device)
    a, b = counter & _WORD, counter >> 32
    c = d = torch.zeros_like(counter)
    keys = [seed & _WORD, torch.full_like(seed, stream)]
    for _ in range(_ROUNDS):
        # The product of two words wraps around in int64, and has the bits that it would have in uint64.
        of_a, of_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (of_c >> 32 & _WORD) ^ b ^ keys[0], (of_a >> 32 & _WORD) ^ d ^ keys[1]
        b, d = of_c & _WORD, of_a & _WORD
        keys = [key + step & _WORD for key, step in zip(keys, _STEPS, strict=True)]
    return torch.stack((a, b, c, d), -1).flatten()[:count]


def uniforms(seed: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers from 0 to 1 − 2^-24, float32 of this shape: the upper 24 bits of the stream's words."""
    count = int(torch.Size(shape).numel())
    return ((words(seed, stream, count) >> 8).float() * 2.0**-24).view(shape)


def signs(seed: Tensor, stream: int, count: int) -> Tensor:
    """+1 or −1, float32 `[count]`: −1 where a word's highest bit is set."""
    return 1.0 - 2.0 * (words(seed, stream, count) >> 31).float()
