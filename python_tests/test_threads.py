"""Threads and instruction sets: the interpreter is free while an operator runs, steps run
beside each other, and no result tells which.
"""

import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
from conftest import compare

import uegr_kernels as uk
from uegr_kernels.core import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def parameter(n: int, seed: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(n, generator=generator))
    p.grad = torch.randn(n, generator=generator)
    return p


def long_mask():
    n, options = (
        1 << 22,
        {
            "threshold": 0.8,
            "sharpness": 5.0,
            "min_probability": 0.0,
            "keep_probability": 1.0,
            "normalization": 2,
        },
    )
    options |= {
        "salient": True,
        "previous": False,
        "rescale": True,
        "target_update": False,
        "layout": [0, 0, n, n],
        "step": 1,
        "seed": 1,
    }
    return (
        torch.ops.uegr_kernels.selection_mask_.default,
        (torch.randn(n), None),
        options | {"out": torch.zeros(n, dtype=torch.bool)},
    )


def long_loss():
    options = {
        "js_weight": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "reduction": 0,
        "regression": False,
        "needs": [True],
    }
    return torch.ops.uegr_kernels.uegr_loss_.default, ([torch.randn(4, 256, 4000)], None), options


@pytest.mark.parametrize("make", [long_mask, long_loss])
def test_python_goes_on_while_an_operator_runs(make):
    # Nobody is made to give up the interpreter here: the other thread gets it from a call that
    # gives it up by itself, or not at all. On a busy machine it may be late for one call, so there
    # are many.
    operator, args, options = make()
    ran, gate, before = threading.Event(), threading.Lock(), sys.getswitchinterval()
    gate.acquire()

    def wait():
        with gate:
            ran.set()

    other = threading.Thread(target=wait)
    other.start()
    sys.setswitchinterval(1e6)
    try:
        gate.release()
        # keeps it
        sum(range(10**7))
        kept_by_a_sum = not ran.is_set()
        for _ in range(100):
            if not ran.is_set():
                operator(*args, **options)
    finally:
        sys.setswitchinterval(before)
    ran_in_between = ran.is_set()
    other.join()
    assert kept_by_a_sum and ran_in_between


def test_two_optimizers_step_in_two_threads():
    def problem(seed):
        ps = [parameter(n, seed + i) for i, n in enumerate((300_000, 70, 20_000))]
        cls, options = (
            (uk.SelectiveAdamW, {"normalization": "rank"}),
            (uk.SelectiveSGD, {"momentum": 0.9, "threshold": 0.1}),
        )[seed % 2]
        return ps, cls(ps, lr=0.01, direction="salient", seed=seed, backend="cpp", **options)

    def train(optimizer, barrier=None):
        for _ in range(10):
            if barrier is not None:
                barrier.wait(timeout=60)
            optimizer.step()

    torch.set_num_threads(2)
    problems, serial = ([problem(10), problem(11)] for _ in range(2))
    for _, optimizer in serial:
        train(optimizer)
    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(target=train, args=(optimizer, barrier)) for _, optimizer in problems
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (ps, optimizer), (expected_ps, other) in zip(problems, serial, strict=True):
        assert all(torch.equal(p, e) for p, e in zip(ps, expected_ps, strict=True))
        for p, e in zip(ps, expected_ps, strict=True):
            assert all(
                torch.equal(value, other.state[e][key]) for key, value in optimizer.state[p].items()
            )


def results() -> dict[str, torch.Tensor]:
    """Gives what the compiled operators make of the same arguments, by name; what stands before the
    colon is a row of the tolerance table.
    """
    generator = torch.Generator().manual_seed(5)
    found: dict[str, torch.Tensor] = {}
    for normalization in ("minmax", "rank"):
        g = torch.randn(5000, generator=generator)
        options = {
            "normalization": normalization,
            "threshold": 0.2,
            "direction": "salient",
            "backend": "cpp",
        }
        row = "selection" if normalization == "minmax" else "rank"
        found[f"{row}: p"] = uk.selection_probability(g, **options)
        found[f"equal: {row} mask"] = uk.selection_mask(g, seed=3, step=2, **options)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            p = torch.nn.Parameter(torch.randn(3000, generator=generator).to(dtype))
            optimizer = uk.SelectiveAdamW([p], seed=7, **options)
            for _ in range(3):
                p.grad = torch.randn(3000, generator=generator).to(dtype)
                optimizer.step()
            row = "step" if normalization == "minmax" else "rank step"
            found |= {
                f"{row}: {dtype} {key}": value
                for key, value in {"p": p.detach(), **optimizer.state[p]}.items()
            }
    logits = [
        torch.randn(*shape, 333, generator=generator, requires_grad=True)
        for shape in ((20,), (3, 20))
    ]
    parts = uk.uegr_loss(*logits, torch.arange(20), js_weight=1.0, return_parts=True, backend="cpp")
    parts.loss.backward()
    found |= {f"step: {name}": value.detach() for name, value in parts._asdict().items()}
    found |= {f"step: gradient {i}": x.grad for i, x in enumerate(logits)}
    g = torch.randn(3, 40, 33, generator=generator)
    found["step: delta"] = uk.fgm_perturbation(g, 0.1, keep_probability=0.5, seed=1, backend="cpp")
    found["step: ball"] = uk.pgd_step(g, g, step_size=0.5, radius=1.0, backend="cpp")
    torch.manual_seed(2)
    module = uk.AdaptiveDropout(backend="cpp")
    for i in range(3):
        x = torch.randn(64, 37, generator=generator, requires_grad=True)
        out = module(x)
        out.square().sum().backward()
        found |= {f"step: dropout {i}": out.detach(), f"step: dropout gradient {i}": x.grad}
    return found


def test_every_instruction_set_gives_the_same(tmp_path):
    here, _ = native.load()
    others = [isa for isa in native.supported_isas() if isa in native.built_isas() and isa != here]
    if not others:
        pytest.skip(f"no other library than {here} is built and runs on this processor")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_threads; "
        "torch.save(test_threads.results(), sys.argv[2])"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(pathlib.Path(__file__).parent), str(tmp_path / isa)],
            env={**os.environ, "UEGR_KERNELS_ISA": isa},
            stderr=subprocess.PIPE,
            text=True,
        )
        for isa in others
    ]
    expected = results()
    for process, isa in zip(running, others, strict=True):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found = torch.load(tmp_path / isa)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            compare(found[name], value, name.split(":")[0], name=f"{isa}, {name}")


RACE = """
import torch
from uegr_kernels.core import native
native.load()
n = 1 << 20
options = {"threshold": 0.8, "sharpness": 5.0, "min_probability": 0.0, "keep_probability": 1.0}
options |= {"normalization": 0, "scope_statistics": None, "layout": [0, 0, n, n] * 2}
options |= {"salient": True, "previous": False, "rescale": True, "target_update": False}
options |= {"step": 1, "seed": 1}
g = torch.randn(n)
torch.ops.uegr_kernels.select_gradients_.default([g, g], [], **options)
"""


def test_sanitizers_see_the_cpp_threads():
    """Under `make sanitize` only: that the library in use is built with the sanitizer, and
    that a race of the caller's own is seen.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "libtsan" not in preloaded and "libasan" not in preloaded:
        pytest.skip("no sanitizer is loaded; run `make sanitize`")
    instrumented = b"__tsan_read4" if "libtsan" in preloaded else b"__asan_report_load"
    assert instrumented in (native.LIBRARIES / f"uegr_kernels_{native.load()[0]}.so").read_bytes()
    if "libtsan" in preloaded:
        done = subprocess.run([sys.executable, "-P", "-c", RACE], capture_output=True, text=True)
        assert done.returncode != 0 and "data race" in done.stderr, done.stderr
