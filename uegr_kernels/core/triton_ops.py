"""What the Triton kernels share: the generator (SPEC 2, by `tl.philox`), pointers out of tables, and the device they are launched on."""

import contextlib
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDING_KEY = tl.constexpr(0x9E3779B9)  # xor-ed into the key's low word for the words that round 16-bit moments
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing to do on the CPU, for the interpreter."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@triton.jit
def pointer(address, dtype: tl.constexpr):
    """An address from a table as a pointer."""
    return address.to(tl.pointer_type(dtype))


@triton.jit
def aligned_pointer(address, dtype: tl.constexpr):
    """The same, promised to be a multiple of 16 bytes: without a mask its accesses have 128 bits."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def element_indices(local, offset, run, stride):
    """The unsharded flat index of local elements: offset + (l // run) * stride + l % run, in 64 bits."""
    return offset + local // run * stride + local % run


@triton.jit
def four_words(q, seed, step, stream):
    """The words of elements 4q to 4q + 3; `q` is a block of int64, the rest are scalars, the seed an int64."""
    low = q.to(tl.uint32)
    return tl.philox(seed, low, (q >> 32).to(tl.uint32), tl.zeros_like(low) + step.to(tl.uint32), tl.zeros_like(low) + stream.to(tl.uint32))


@triton.jit
def words_in_order(first, seed, step, stream, BLOCK: tl.constexpr):
    """The words of `BLOCK` elements from the index `first` (int64, a multiple of 4) on: one call serves four neighbours."""
    a, b, c, d = four_words(first // 4 + tl.arange(0, BLOCK // 4), seed, step, stream)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])


@triton.jit
def words(indices, seed, step, stream):
    """The words of elements in any order: a call each."""
    a, b, c, d = four_words(indices >> 2, seed, step, stream)
    lane = indices & 3
    return tl.where(lane < 2, tl.where(lane < 1, a, b), tl.where(lane < 3, c, d))


@triton.jit
def uniform(word, dtype: tl.constexpr):
    """u = (word >> 8) * 2^-24, in [0, 1)."""
    return (word >> 8).to(tl.int32).to(dtype) * 5.9604644775390625e-08


def bits(x: float) -> int:
    """A float as an integer of its 64 bits: as a number Triton would round it to float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


@triton.jit
def from_bits(x):
    """The float64 again."""
    return x.to(tl.int64).to(tl.float64, bitcast=True)
