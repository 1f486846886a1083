"""What the Triton kernels share: the generator (docs/spec.md, 2, by `tl.philox`), pointers out of
tables, and the device they are launched on.
"""

import contextlib
import ctypes
import os
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .memory import check_there as check_there
from .memory import refuse_expanded as refuse_expanded

# xor-ed into the key's low word for the words that round 16-bit moments
ROUNDING_KEY = tl.constexpr(0x9E3779B9)
# as Triton asks, when a kernel is decorated
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# of an elementwise program
WARPS = 4
# of gradients between their statistics and their update: what stays in the second-level cache
GROUP_BYTES = 24 << 20
# what replays of graphs copy to the device again
CAPTURED: list[Tensor] = []
DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def check_dtype(name: str, x: Tensor) -> None:
    """Raises RuntimeError for a tensor of a dtype that no kernel takes."""
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"{name} is {str(x.dtype).removeprefix('torch.')}; use float32, bfloat16, float16 or "
            "float64"
        )


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing to do on
    the CPU, for the interpreter.
    """
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def compile_options(warps: int) -> dict[str, int]:
    """Returns what a launch has its kernel compiled with. Products and sums are fused, which is
    Triton's default up to 3.9, with a warning, and no longer after that.
    """
    return {"num_warps": warps, "enable_fp_fusion": True}


def lanes() -> int:
    """Returns the threads of a warp on the current GPU: of AMD's some have 64, some 32."""
    return (
        int(triton.runtime.driver.active.get_current_target().warp_size)
        if torch.version.hip
        else 32
    )


def to_device(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes a tensor on the device, without waiting for the copy."""
    values = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return values
    values = values.pin_memory()
    if capturing(device):
        CAPTURED.append(values)
    return values.to(device, non_blocking=True)


def pieces(counts: list[int]) -> Tensor:
    """Returns (tensor, piece) of every piece, int32, where tensors have so many: what the programs
    of one launch take up.
    """
    many = torch.tensor(counts, dtype=torch.int64)
    tensor = torch.arange(len(counts)).repeat_interleave(many)
    piece = torch.arange(len(tensor)) - (many.cumsum(0) - many).repeat_interleave(many)
    return torch.stack((tensor, piece), 1).int()


def capturing(device: torch.device) -> bool:
    """Says whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def mark(device: torch.device, event: torch.cuda.Event | None) -> torch.cuda.Event | None:
    """Returns what says, when asked, whether the work given to the device so far is done: the
    event, or a new one; None on the CPU.
    """
    if device.type == "cuda":
        event = torch.cuda.Event() if event is None else event
        event.record()
    return event


class Upload:
    """Brings 64-bit numbers to `target` by an asynchronous copy from pinned memory that nobody
    writes while a copy of it is in flight.

    A captured copy is made again at every replay, from the same memory: a step under capture writes
    an upload `apart`, once.
    """

    def __init__(self, size: int, device: torch.device):
        self.target = torch.empty(size, dtype=torch.int64, device=device)
        self.content = b""
        # each with what says that its last copy is through
        self.sources: list[tuple[Tensor, torch.cuda.Event | None]] = []
        # for a capture, which should not allocate pinned memory
        self.spare: Tensor | None = None

    def write(self, content: bytes) -> None:
        """Makes `target` hold the content; nothing is copied where it already does."""
        if content == self.content:
            return
        free = (i for i, (_, copied) in enumerate(self.sources) if copied is None or copied.query())
        at = next(free, None)
        source, copied = (self._source(), None) if at is None else self.sources.pop(at)
        ctypes.memmove(source.data_ptr(), content, len(content))
        self.target.copy_(source, non_blocking=True)
        self.content = content
        if not capturing(self.target.device):
            copied = mark(self.target.device, copied)
            self.spare = (
                self._source() if self.spare is None and self.target.is_cuda else self.spare
            )
        self.sources.append((source, copied))

    def apart(self) -> "Upload":
        """Returns another one of the same size, with memory of its own."""
        other = Upload(len(self.target), self.target.device)
        other.sources = [] if self.spare is None else [(self.spare, None)]
        self.spare = None
        return other

    def _source(self) -> Tensor:
        return torch.empty(len(self.target), dtype=torch.int64, pin_memory=self.target.is_cuda)


FormT = TypeVar("FormT", bound=tuple[object, ...])


def constexprs(form: FormT) -> FormT:
    """Returns a NamedTuple of options as a kernel takes it: each value a constant; None stays."""
    kind: Any = type(form)
    made: FormT = kind._make(None if value is None else tl.constexpr(value) for value in form)
    return made


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """Returns x in another dtype, rounded to nearest. Triton's interpreter cuts bfloat16 off and
    spoils its denormals: there it is done by hand.
    """
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widened(x, dtype: tl.constexpr):
    """Returns what was read from memory in the arithmetic's dtype; by hand where the interpreter
    spoils denormals.
    """
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def pointer(address, dtype: tl.constexpr):
    """Returns an address from a table as a pointer."""
    return address.to(tl.pointer_type(dtype))


@triton.jit
def aligned_pointer(address, dtype: tl.constexpr):
    """Returns an address from a table as a pointer, promised to be a multiple of 16 bytes: its
    accesses have 128 bits without a mask.
    """
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def element_indices(local, offset, run, stride):
    """Returns the unsharded flat index of local elements: offset + (l // run) * stride + l % run,
    in 64 bits.
    """
    return offset + local // run * stride + local % run


@triton.jit
def four_words(q, seed, step, stream):
    """Returns the words of elements 4q to 4q + 3; `q` is a block of int64, the rest are scalars,
    the seed an int64.
    """
    low = q.to(tl.uint32)
    return tl.philox(
        seed,
        low,
        (q >> 32).to(tl.uint32),
        tl.zeros_like(low) + step.to(tl.uint32),
        tl.zeros_like(low) + stream.to(tl.uint32),
    )


@triton.jit
def words_in_order(first, seed, step, stream, BLOCK: tl.constexpr):
    """Returns the words of `BLOCK` elements from the index `first` (int64, a multiple of 4) on:
    one call serves four neighbours.
    """
    a, b, c, d = four_words(first // 4 + tl.arange(0, BLOCK // 4), seed, step, stream)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])


@triton.jit
def words(indices, seed, step, stream):
    """Returns the words of elements in any order: a call each."""
    a, b, c, d = four_words(indices >> 2, seed, step, stream)
    lane = indices & 3
    return tl.where(lane < 2, tl.where(lane < 1, a, b), tl.where(lane < 3, c, d))


@triton.jit
def uniform(word, dtype: tl.constexpr):
    """Returns u = (word >> 8) * 2^-24, in [0, 1)."""
    return (word >> 8).to(tl.int32).to(dtype) * 5.9604644775390625e-08


def bits(x: float) -> int:
    """Returns a float as an integer of its 64 bits; as a number Triton would round it."""
    return int.from_bytes(struct.pack("<d", x), "little", signed=True)


@triton.jit
def from_bits(x):
    """Returns the float64 of `bits` again."""
    return x.to(tl.int64).to(tl.float64, bitcast=True)
