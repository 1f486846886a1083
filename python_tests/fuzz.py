"""Random arguments for the compiled operators, right and wrong: `python python_tests/fuzz.py --seed
0 --seconds 60`.

A refusal is fine. What is not: a crash (the sanitized build, `make fuzz`, makes one of every access
out of bounds), a call that hangs, a write outside of the tensors an operator writes into, or any
write by a call that is refused. A failure names the case, which `--case N` with the same seed runs
again.
"""

import argparse
import faulthandler
import math
import os
import random
import subprocess
import sys
import tempfile
import time

import torch
from torch import Tensor

import uegr_kernels
from uegr_kernels.core import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.complex64)
SIZES = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 255, 256, 257, 511, 1023, 1025, 3000)
LARGE = ((1 << 18) + 1, 300_000, (1 << 20) + 1, (1 << 20) + 1000)
INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    255,
    256,
    2**24 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32,
    -(2**31),
    2**63 - 1,
    -(2**63),
)
NUMBERS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-300,
    -1e-300,
    1e300,
    -1e300,
    1e38,
    math.inf,
    -math.inf,
    math.nan,
    2.0**-24,
    1 + 2.0**-52,
)
HANG_S = 60


class Fuzzer:
    """Makes one case's arguments; remembers the memory around every tensor it hands out."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.wrong, self.mistakes = self.chance(0.4), 0
        # whether a mixture of devices or layouts takes the call to the reference
        self.elsewhere = False
        # the tensor, all of its memory, a copy of that
        self.memory: list[tuple[Tensor, Tensor, Tensor]] = []

    # ---- Values

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, choices):
        return self.random.choice(choices)

    def number(self, low: float, high: float) -> float:
        return self.pick(NUMBERS) if self.chance(0.05) else self.random.uniform(low, high)

    def integer(self) -> int:
        return self.pick(INTEGERS) if self.chance(0.5) else self.random.randrange(-(2**63), 2**63)

    def shape(self) -> list[int]:
        if self.chance(0.02):
            return [self.pick(LARGE)]
        if self.chance(0.02):
            return [self.pick((2, 3, 1025)), self.pick((257, 3000))]
        dims = self.pick((0, 1, 1, 1, 2, 2, 3, 4))
        return [
            self.pick(SIZES if dims == 1 else SIZES[:13] if dims == 2 else SIZES[:6])
            for _ in range(dims)
        ]

    def tensor(self, shape, dtype: torch.dtype, *, plain: bool = False) -> Tensor:
        """Gives random values in random strides, memory of nobody's around and between them."""
        shape, strides, at = list(shape), [0] * len(shape), 1
        order = list(reversed(range(len(shape))))
        if not plain and self.chance(0.3):
            self.random.shuffle(order)
        for d in order:
            gap = self.pick((0, 1, 2, 7)) if not plain and self.chance(0.15) else 0
            strides[d] = at * (2 if gap and d == order[0] else 1)
            at = strides[d] * max(shape[d], 1) + gap
        if not plain and shape and self.chance(0.03):
            strides[self.random.randrange(len(shape))] = 0
        before = 0 if plain else self.pick((0, 0, 1, 3, 64))
        raw = self.values(before + at + self.pick((0, 1, 16)), dtype)
        out = raw.as_strided(shape, strides, before)
        self.memory.append((out, raw, raw.clone()))
        return out

    def values(self, n: int, dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point and not dtype.is_complex:
            return torch.randint(0, 2, (n,), generator=self.generator).to(dtype)
        x = torch.randn(n, generator=self.generator, dtype=torch.float64) * 10.0 ** self.pick(
            (0, 0, 0, -3, 3, -30, 30, 300)
        )
        if self.chance(0.2):
            x = x.abs()
        if self.chance(0.1):
            x[torch.rand(n, generator=self.generator) < 0.2] = self.pick(NUMBERS)
        if self.chance(0.05):
            x.fill_(self.pick(NUMBERS))
        return x.to(dtype)

    def like(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [self.tensor(t.shape, dtype) for t in tensors]

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        out = self.tensor((), dtype, plain=True)
        out.copy_(torch.tensor(value, dtype=torch.float64))
        self.memory[-1][2].copy_(self.memory[-1][1])
        return out

    def maybe(self, make, probability: float = 0.3):
        return make() if self.chance(probability) else None

    # ---- Wrong arguments

    def strange_tensor(self) -> Tensor:
        kind = self.random.randrange(8)
        dtype = self.pick(FLOATS + OTHERS)
        self.elsewhere |= kind < 2
        if kind == 0:
            return torch.empty(self.shape(), dtype=dtype, device="meta")
        if kind == 1:
            return torch.eye(3).to_sparse()
        # memory given back; a call that goes to plain torch would read it
        if kind == 2 and self.mistakes == 1:
            out = torch.zeros(self.pick(SIZES) + 2, dtype=dtype)[self.pick((0, 1)) :]
            out.untyped_storage().resize_(self.pick((0, 0, out.element_size())))
            return out
        if kind == 3:
            return torch.zeros(1, dtype=dtype).expand(self.pick((2, 300)))
        if kind == 4:
            return torch.zeros(self.shape(), dtype=torch.complex64).conj()
        return self.tensor(self.shape(), dtype)

    def spoil(self, value):
        """Gives something else in an argument's place, of its type as a rule."""
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.integer()
        if isinstance(value, float):
            return self.pick(NUMBERS)
        if isinstance(value, Tensor) or value is None:
            return self.strange_tensor() if self.chance(0.9) else None
        if isinstance(value, list) and value:
            at, value = self.random.randrange(len(value)), list(value)
            kind = self.random.randrange(4)
            if kind == 0:
                del value[at]
            elif kind == 1:
                value.append(value[at])
            elif kind == 2:
                value.clear()
            else:
                value[at] = self.spoil(value[at])
            return value
        return value

    def spoiled(self, args: list, options: dict) -> tuple[list, dict]:
        self.mistakes = self.pick((1, 1, 2, 3))
        for _ in range(self.mistakes):
            names = list(options)
            at = self.random.randrange(len(args) + len(names))
            if at < len(args):
                args[at] = self.spoil(args[at])
            else:
                options[names[at - len(args)]] = self.spoil(options[names[at - len(args)]])
        return args, options

    # ---- The operators: positional arguments, keywords, the tensors that may be written

    def selection(self) -> dict:
        normalization = self.random.randrange(4)
        return {
            "threshold": self.number(-1, 2),
            "sharpness": self.number(0, 50),
            "normalization": normalization,
            "salient": self.chance(0.5),
            "previous": self.chance(0.3) and normalization < 2,
            "rescale": self.chance(0.7),
            "min_probability": self.number(0, 1) if self.chance(0.3) else 0.0,
            "keep_probability": self.random.uniform(0.01, 1),
            "target_update": self.chance(0.3),
        }

    def layout(self, tensors: list[Tensor]) -> list[int]:
        out: list[int] = []
        for i, t in enumerate(tensors):
            n = t.numel()
            run = self.pick((1, 3, 4, 250, 256, max(n, 1))) if self.chance(0.2) else n
            out += [
                i,
                0 if self.chance(0.7) else self.random.randrange(2**40),
                run,
                run if self.chance(0.5) else run + self.pick(SIZES),
            ]
        return out

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        return [self.tensor(self.shape(), dtype) for _ in range(self.pick((0, 1, 1, 2, 3, 8)))]

    def one_by_one(
        self, count: int, value: float, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Gives a state of one value by parameter, or all of them in one tensor."""
        if count > 1 and self.chance(0.2):
            out = self.tensor((count,), dtype, plain=True)
            out.copy_(torch.tensor(value, dtype=torch.float64))
            self.memory[-1][2].copy_(self.memory[-1][1])
            return [out]
        return [self.scalar(value, dtype) for _ in range(count)]

    def statistics(self, count: int, normalization: int) -> Tensor | None:
        if self.chance(0.7) or normalization == 3:
            return None
        rows = self.pick((1, count))
        if normalization == 2:
            return torch.randint(0, 5, (rows, 0x7F80), generator=self.generator)
        return torch.rand(rows, 2, generator=self.generator, dtype=torch.float64)

    def step(self, moments: int) -> tuple[list, dict, list]:
        dtype = self.pick(FLOATS)
        params = self.tensors(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        states = [
            self.like(params, self.pick((wide, wide, torch.bfloat16))) for _ in range(moments)
        ]
        grads = self.like(params, dtype)
        options = self.selection()
        steps = self.one_by_one(len(params), float(self.pick((0, 1, 5, 2**24 - 2, 2**24))))
        kept = [
            self.one_by_one(len(params), value, wide) if options["previous"] else []
            for value in (self.pick((math.nan, 0.1)), 0.5)
        ]
        options |= {
            "scope_statistics": self.statistics(len(params), options["normalization"]),
            "layout": self.layout(params),
            "grad_scale": self.maybe(lambda: self.scalar(self.number(1, 1000)), 0.1),
            "maximize": self.chance(0.2),
            "found_inf": self.maybe(lambda: self.scalar(float(self.chance(0.5))), 0.1),
            "seed": self.random.randrange(-(2**63), 2**63),
            "lr": self.number(0, 0.1),
            "lr_tensor": self.maybe(lambda: self.scalar(0.01), 0.1),
            "weight_decay": self.number(0, 0.1),
        }
        written = [tensor for tensors in (params, *states, steps, *kept) for tensor in tensors]
        return [params, grads, *states, steps, *kept], options, written

    def selective_adamw_(self):
        args, options, written = self.step(3)
        if self.chance(0.6):
            args[4] = []
        tensors = self.chance(0.1)
        for name in ("beta1", "beta2"):
            options |= {
                name: self.number(0, 1),
                f"{name}_tensor": self.scalar(0.9) if tensors else None,
            }
        return args, options | {"eps": self.number(0, 1e-3)}, written

    def selective_sgd_(self):
        args, options, written = self.step(1)
        if self.chance(0.4):
            args[2] = []
        return (
            args,
            options
            | {
                "momentum": self.number(0, 1),
                "dampening": self.number(0, 1),
                "nesterov": self.chance(0.3),
            },
            written,
        )

    def gradients(self) -> tuple[list, list, dict]:
        grads = self.tensors(self.pick(FLOATS))
        saliencies = (
            [self.tensor(g.shape, self.pick(FLOATS)) for g in grads] if self.chance(0.3) else []
        )
        return grads, saliencies, {"layout": self.layout(grads)}

    def select_gradients_(self):
        grads, saliencies, options = self.gradients()
        options |= self.selection() | {"step": self.random.randrange(2**24), "seed": self.integer()}
        return (
            [grads, saliencies],
            options | {"scope_statistics": self.statistics(len(grads), options["normalization"])},
            grads,
        )

    def selective_statistics_(self):
        grads, saliencies, options = self.gradients()
        normalization = self.random.randrange(3)
        kept = [
            self.one_by_one(len(grads), value) if normalization < 2 and self.chance(0.3) else []
            for value in (0.1, 0.5)
        ]
        rank = normalization == 2
        out = self.tensor(
            (self.pick((1, len(grads))), 0x7F80 if rank else 2),
            torch.int64 if rank else torch.float64,
            plain=True,
        )
        sizes = [g.numel() * self.pick((1, 1, 2, 5000)) for g in grads] if self.chance(0.5) else []
        options |= {"sizes": sizes, "normalization": normalization, "grad_scale": None, "out": out}
        return [grads, saliencies, *kept], options, [out]

    def looked_at(self, dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        grad = self.tensor(self.shape(), self.pick(FLOATS))
        return (
            grad,
            self.maybe(lambda: self.tensor(grad.shape, self.pick(FLOATS))),
            self.tensor(grad.shape, dtype),
        )

    def selection_probability_(self):
        grad, saliency, out = self.looked_at(self.pick((torch.float32, torch.float64)))
        return [grad, saliency], self.selection() | {"out": out}, [out]

    def selection_mask_(self):
        grad, saliency, out = self.looked_at(torch.bool)
        options = self.selection() | {
            "layout": self.layout([grad]),
            "step": self.random.randrange(2**24),
            "seed": self.integer(),
        }
        return [grad, saliency], options | {"out": out}, [out]

    def logits(self) -> tuple[list, dict]:
        rows, classes = (
            self.pick(SIZES[:13]),
            self.pick((1, 2, 3, 15, 16, 17, 100, 1000, 1023, 1025, 2050)),
        )
        dtype, regression = self.pick(FLOATS), self.chance(0.2)
        logits = [
            self.tensor(
                (rows, classes) if self.chance(0.5) else (self.pick((1, 2, 3)), rows, classes),
                dtype,
            )
            for _ in range(self.pick((1, 2, 3)))
        ]
        labels = None
        if self.chance(0.7):
            soft = regression or self.chance(0.3)
            labels = (
                self.tensor((rows, classes), self.pick(FLOATS))
                if soft
                else torch.randint(0, classes, (rows,))
            )
            if not soft and rows and self.chance(0.3):
                labels[0] = -100
        options = {
            "js_weight": self.number(0, 1),
            "label_smoothing": self.number(0, 1) if self.chance(0.3) else 0.0,
            "ignore_index": -100,
            "reduction": self.random.randrange(3),
            "regression": regression,
            "needs": [self.chance(0.7) for _ in logits],
        }
        return [logits, labels], options

    def uegr_loss(self):
        return *self.logits(), []

    def uegr_loss_(self):
        args, options = self.logits()
        return (
            args,
            options,
            [x for x, needed in zip(args[0], options["needs"], strict=True) if needed],
        )

    def scaled(self) -> tuple[list, Tensor]:
        shape, dtype = self.shape(), self.pick(FLOATS)
        gradients = [self.tensor(shape, dtype) for _ in range(self.pick((0, 1, 3)))]
        by_row = len(shape) > 1 and self.chance(0.5)
        return gradients, self.tensor(shape[-2:-1] if by_row else (), self.pick(FLOATS[::3]))

    def scale_gradients(self):
        gradients, grad_loss = self.scaled()
        return [gradients, grad_loss, self.tensor((3,), torch.float32)], {}, []

    def scale_gradients_(self):
        gradients, grad_loss = self.scaled()
        return [gradients, grad_loss], {}, gradients

    def perturbed(self) -> tuple[Tensor, Tensor | None, Tensor, dict]:
        grad = self.tensor(self.shape(), self.pick(FLOATS))
        mask = self.maybe(
            lambda: self.tensor(
                grad.shape[: self.random.randrange(grad.dim() + 1)],
                self.pick((*FLOATS, torch.bool)),
            )
        )
        return (
            grad,
            mask,
            self.tensor(grad.shape, self.pick(FLOATS)),
            {"norm": self.random.randrange(2), "per": self.random.randrange(3)},
        )

    def fgm_perturbation_(self):
        grad, mask, out, options = self.perturbed()
        options |= {
            "epsilon": self.number(0, 1),
            "keep_probability": self.random.random(),
            "step": self.random.randrange(2**24),
        }
        return [grad, mask, self.maybe(lambda: torch.tensor(self.integer())), out], options, [out]

    def pgd_step_(self):
        grad, mask, out, options = self.perturbed()
        delta = self.tensor(grad.shape, grad.dtype)
        return (
            [delta, grad, mask, out],
            options | {"step_size": self.number(0, 1), "radius": self.number(0, 1)},
            [out],
        )

    def perturb_weights_(self):
        params = self.tensors(self.pick(FLOATS))
        grads = self.like(params, self.pick(FLOATS))
        options = {
            "streams": list(range(len(params))),
            "epsilon": self.number(0, 1),
            "together": self.chance(0.5),
            "keep_probability": self.random.random(),
            "step": self.random.randrange(2**24),
        }
        return [params, grads, self.maybe(lambda: torch.tensor(self.integer()))], options, params

    def dropped(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.shape()[:3]
        units = self.pick(SIZES if math.prod(rows) < 1 << 12 else SIZES[:6])
        h = self.tensor([*rows, units], self.pick(FLOATS))
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        return h, self.tensor(h.shape[-1:], wide), torch.tensor(self.integer())

    def adaptive_dropout(self):
        h, rates, key = self.dropped()
        return [h, rates, key, self.tensor(rates.shape, rates.dtype)], {}, []

    def adaptive_dropout_backward(self):
        return [*self.dropped()], {}, []

    def dropout_rates_(self):
        units, dtype = self.pick(SIZES), self.pick(FLOATS[::3])
        state = [self.tensor((units,), dtype) for _ in range(2)]
        options = {
            "p": self.number(0, 1),
            "max_p": self.number(0, 1),
            "momentum": self.number(0, 1),
            "fold": self.chance(0.5),
        }
        return state, options, state

    # ---- One case

    def run(self, name: str) -> str:
        """Calls the operator; returns "done" or "refused". Raises AssertionError for a write
        where none belongs.
        """
        args, options, written = getattr(self, name)()
        if self.wrong:
            args, options = self.spoiled(args, options)
        torch.set_num_threads(self.pick((1, 1, 2, 4)))
        with torch.no_grad():
            try:
                getattr(torch.ops.uegr_kernels, name).default(*args, **options)
                outcome = "done"
            except Exception:
                # whatever its type: the arguments may be anything
                outcome = "refused"
        for tensor, memory, before in () if self.elsewhere else self.memory:
            if (
                outcome == "done"
                and not is_expanded(tensor)
                and (self.wrong or any(tensor is other for other in written))
            ):
                inside = before.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
                inside.copy_(tensor)
            same = torch.equal(bits_of(memory), bits_of(before))
            assert same, (
                f"{name} was {outcome} and wrote where it must not: shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}"
            )
        return outcome


def is_expanded(x: Tensor) -> bool:
    return any(stride == 0 and n > 1 for n, stride in zip(x.shape, x.stride(), strict=True))


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


OPERATORS = {
    name.removeprefix("uegr_kernels::").split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if "uegr_kernels::" in name
}
# that one is composed in Python
OPERATORS = sorted(OPERATORS - {"linear_uegr_loss"})


def run_case(seed: int, case: int) -> str:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    fuzzer = Fuzzer(f"{seed} {case}")
    name = fuzzer.pick(OPERATORS)
    outcome = fuzzer.run(name)
    faulthandler.cancel_dump_traceback_later()
    return f"{name} {outcome}"


def work(seed: int, seconds: float, place: int) -> None:
    """Runs cases one after another, each written to `place` before; the counts at the end."""
    counts: dict[str, int] = {}
    end, case = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        os.pwrite(place, f"{case:20d}".encode(), 0)
        outcome = run_case(seed, case)
        counts[outcome] = counts.get(outcome, 0) + 1
        case += 1
    for outcome in sorted(counts):
        print(f"{outcome:45s}{counts[outcome]:8d}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Random arguments for the compiled operators.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--case", type=int, help="run this one alone")
    # a file's descriptor: this is the process that may crash
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if native.why_not():
        print(native.why_not())
        return 1
    if arguments.case is not None:
        print(run_case(arguments.seed, arguments.case))
        return 0
    if arguments.place is not None:
        work(arguments.seed, arguments.seconds, arguments.place)
        return 0
    with tempfile.TemporaryFile() as place:
        command = [
            sys.executable,
            __file__,
            "--seed",
            arguments.seed,
            "--seconds",
            arguments.seconds,
            "--place",
            place.fileno(),
        ]
        done = subprocess.run(list(map(str, command)), pass_fds=[place.fileno()])
        last = int(os.pread(place.fileno(), 20, 0) or 0)
    where = f"{uegr_kernels.__file__}, {native.load()[0]}"
    print(
        f"seed {arguments.seed}: {last + 1} cases in {arguments.seconds:g} s, {where}: "
        f"{'clean' if done.returncode == 0 else 'FAILED'}"
    )
    if done.returncode:
        print(
            f"the last case crashed, hung or wrote too far; again: {sys.argv[0]} --seed "
            f"{arguments.seed} --case {last}"
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
