"""Philox4x32-10 in PyTorch integers: the package's one generator (docs/spec.md, 2; Salmon et al.,
SC'11).
"""

from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
Word = int | Tensor
# xor-ed into the key's low word for the words that round 16-bit moments
ROUNDING_KEY = 0x9E3779B9


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Any, Any, Any, Any]:
    """Runs ten rounds over four counter words (int64 tensors or ints that hold 32 bits) under a
    two-word key; returns words of the same kinds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 64-bit product wraps into int64 with the right bits, so shift and mask give both halves.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32 & MASK) ^ c1 ^ k0,
            p1 & MASK,
            (p0 >> 32 & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def element_indices(
    n: int, layout: tuple[int, int, int], device: torch.device | None = None
) -> Tensor:
    """Returns the unsharded flat index of each of `n` local elements: offset + (l // run) * stride
    + l % run.
    """
    offset, run, stride = layout
    local = torch.arange(n, dtype=torch.int64, device=device)
    return offset + local // max(run, 1) * stride + local % max(run, 1)


def words(
    indices: Tensor, *, seed: int | Tensor, step: int | Tensor, stream: int, rounding: bool = False
) -> Tensor:
    """Returns the 32-bit word of every element index, as int64.

    The key is the seed's two words, a Python integer modulo 2^64 or an int64 tensor; the counter is
    (index >> 2, step, stream).
    """
    low = seed & MASK ^ (ROUNDING_KEY if rounding else 0)
    q = indices >> 2
    lanes = philox4x32((q & MASK, q >> 32 & MASK, step, stream), (low, seed >> 32 & MASK))
    lane = indices & 3
    return torch.where(
        lane < 2,
        torch.where(lane < 1, lanes[0], lanes[1]),
        torch.where(lane < 3, lanes[2], lanes[3]),
    )


def uniform(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns u = (word >> 8) * 2^-24, in [0, 1)."""
    return (word >> 8).to(dtype) * 2.0**-24
