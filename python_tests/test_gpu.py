"""Triton's kernels as compiled, on a GPU (TRITON_INTERPRET=0), and what `python -m bench.gpu` says where there is none."""

import json
import os

import pytest
import torch
from conftest import compare
from test_selective import ADAMW_CASES, DTYPES, OPTIMIZERS, SGD_CASES, SPREAD, as_parameters, noting_near_ties, problem, states_of, trained

import uegr_kernels as uk
from bench import gpu as bench_gpu

SHAPES = [(0,), (5, 41), (1025,), (70_001,), (31, 33)]


@pytest.fixture
def gpu() -> torch.device:
    if bench_gpu.no_gpu():
        pytest.skip(f"no GPU: {bench_gpu.no_gpu()}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's kernels are interpreted in this process; run `TRITON_INTERPRET=0 python -m pytest -k gpu`")
    return torch.device("cuda")


def moved(tensors, device):
    return [t.to(device) for t in tensors]


CASES = [(uk.SelectiveAdamW, case.values[0], case.id) for case in ADAMW_CASES[::3]]
CASES += [(uk.SelectiveSGD, case.values[0], case.id) for case in SGD_CASES[1::3]]
CASES = [pytest.param(*case[:2], DTYPES[i % 4], id=f"{case[0].__name__} {case[2]}") for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("cls", "options", "dtype"), CASES)
def test_gpu_steps_agree_with_the_reference(monkeypatch, gpu, cls, options, dtype):
    options = SPREAD | {"lr": 0.3} | options
    ranked = options.get("normalization") == "rank"
    start, gradients = problem(SHAPES, dtype)
    with noting_near_ties(monkeypatch, histogram=ranked) as near:
        expected, other = trained(cls, "reference", start, gradients, **options)
    params, optimizer = trained(cls, "triton", moved(start, gpu), [moved(grads, gpu) for grads in gradients], **options)
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        found = {"parameter": (p, q)} | {key: (optimizer.state[p][key], value) for key, value in states_of(other, q).items()}
        for name, (ours, value) in found.items():
            ignored = near[i] if ours.shape == q.shape else None
            compare(ours.cpu(), value, "rank step" if ranked else "step", name=f"{name} of {i}", ignore=ignored, row=dtype)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"statistics": "previous"}, {"normalization": "rank"}], ids=str)
def test_gpu_replays_between_eager_steps_equal_eager_steps(gpu, cls, options):
    start, gradients = problem(SHAPES, steps=5)
    gradients = [moved(grads, gpu) for grads in gradients]
    options = SPREAD | options | {"lr": torch.tensor(0.1, device=gpu), "capturable": True, "backend": "triton"}
    expected, _ = trained(cls, start=moved(start, gpu), gradients=gradients, **options)

    params = as_parameters(moved(start, gpu))
    optimizer = cls(params, **options)
    static = [torch.empty_like(g) for g in gradients[0]]

    def step(grads) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    step(gradients[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static)
    for k in range(1, 5):
        if k % 2:
            torch._foreach_copy_(static, gradients[k])
            graph.replay()
        else:
            step(gradients[k])
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        compare(p.detach().cpu(), q.detach().cpu(), "equal", name=f"parameter {i}")


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_gpu_steady_steps_neither_wait_nor_allocate(gpu, cls):
    start, gradients = problem(SHAPES, steps=4)
    gradients = [moved(grads, gpu) for grads in gradients]
    params, optimizer = trained(cls, "triton", moved(start, gpu), gradients[:3], seed=1, capturable=True)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, g in zip(params, gradients[3], strict=True):
            p.grad = g
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch):
    for version, said in ((None, "is built without CUDA and ROCm"), ("13.0", "is built for GPUs but finds none")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert bench_gpu.main(["--output", str(tmp_path / "new")]) == bench_gpu.NO_GPU == 3
        assert f"No GPU was found: torch {torch.__version__} {said}" in capsys.readouterr().out
        kept = json.loads((tmp_path / "new" / "gpu.json").read_text())
        assert said in kept["no_gpu"] and kept["tests"] is None and kept["results"] == []
        assert said in (tmp_path / "new" / "gpu.md").read_text()


def test_what_was_measured_is_written(tmp_path):
    spread = {"median": 2e-6, "q1": 1e-6, "q3": 3e-6}
    figures = {"seconds": spread, "gb_s": 1.0, "copy_share": 0.5}
    peer = figures | {"ours_over_this": {"median": 0.5, "q1": 0.4, "q3": 0.6}}
    lines = [{"case": "a", "contestants": {"uegr_kernels": figures, "torch": peer}}, {"case": "b", "error": "no memory"}]
    about = {"no_gpu": None, "gpu": "G", "driver": "1", "commit": "c", "versions": {"torch": "2"}}
    bench_gpu.report(tmp_path, about, lines, {"status": 0, "summary": "3 passed"})
    bench_gpu.pictures(tmp_path, lines)
    text = (tmp_path / "gpu.md").read_text()
    assert "| a | torch | 2.0 | 0.500 | 50% |" in text and "| b | no memory |" in text and "3 passed" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["results"] == lines
    assert [path.name for path in tmp_path.glob("*.png")] == ["gpu-0.png"]
