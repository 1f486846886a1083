"""The CUDA kernels without a GPU: what nvcc and the disassembly say, and what they compute as
their threads take turns on a host.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import types

import pytest
import torch
from conftest import operator_tests
from torch._subclasses.fake_tensor import FakeTensorMode

import uegr_kernels as uk
from bench import gpu_model
from bench.cuda_code import (
    ARCHITECTURES,
    DEFINITIONS,
    HEADERS,
    INCLUDES,
    ROOT,
    SOURCES,
    TORCH,
    WORKERS,
    Kernel,
    asked_ahead,
    compile_all,
    count,
    cuobjdump,
    is_global,
    is_whole,
    kept,
    kernels,
    nvcc_version,
    opcode,
    run,
)
from uegr_kernels import __main__ as program
from uegr_kernels.core import backends, native


@pytest.fixture(params=ARCHITECTURES)
def arch(request) -> str:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed: the CUDA sources are not compiled here")
    return request.param


@pytest.fixture
def read(arch):
    """Reads an operator's kernels, compiled for one architecture."""
    if not cuobjdump():
        pytest.skip(
            "cuobjdump, which comes with Triton and with the CUDA toolkit, is not installed"
        )
    return lambda operator: kernels(operator, arch)


@pytest.mark.parametrize("operator", SOURCES)
def test_sources_compile_without_a_warning(arch, operator):
    report = (compile_all()[operator, arch].result() / "report.txt").read_text()
    assert "Compiling entry function" in report and "warning" not in report


@pytest.mark.parametrize("operator", SOURCES)
def test_full_blocks_keep_to_registers_and_whole_accesses(read, operator):
    found = {name: one for name, one in read(operator).items() if re.search("_full|Whole", name)}
    assert found, "no kernel is named full"
    for name, kernel in found.items():
        assert (kernel.stack, kernel.spilled) == (0, 0), f"{name} spills"
        assert not [
            text for _, text in kernel.instructions if re.match(r"LDL|STL", opcode(text))
        ], f"{name} uses local memory"
        loops = kernel.element_loops()
        assert loops, f"{name} has no loop over elements"
        accesses = [text for loop in loops for text in loop if is_global(text)]
        # a mask of tokens has a byte for many elements
        narrow = [text for text in accesses if not is_whole(text) and ".U8" not in text]
        assert len(narrow) <= 0.05 * len(accesses), f"{name}: {narrow}"


def updates(kernel: Kernel) -> list[str]:
    """Gives the loop that updates elements."""
    (loop,) = [loop for loop in kernel.element_loops() if count(loop, "STG") and count(loop, "LDG")]
    return loop


# Of step_full: f is float32, t bfloat16; then this step's statistics or the previous one's, the
# target, AMSGrad or momentum, the update rule.
FULL = re.compile(r"step_fullI([ft])Lb([01])ELb([01])ELb([01])ENS_\d+(AdamW|SGD)")


def test_the_step_is_light(read):
    found = {
        match: kernel for name, kernel in read("selective").items() if (match := FULL.match(name))
    }
    assert len(found) == 2**5, found.keys()
    for match, kernel in found.items():
        dtype, _, _, more, rule = match.groups()
        registers = 64 if dtype == "f" and (rule, more) != ("AdamW", "1") else 80
        assert kernel.registers <= registers, f"{kernel.name}: {kernel.registers} registers"
        loop = updates(kernel)
        # bfloat16 draws twice, for the selection and for the rounding
        elements, turns, most, draws = (4, 1, 68, 1) if dtype == "f" else (8, 2, 106, 2)
        issued = kernel.run_through(loop, turns)
        assert len(issued) <= elements * most, f"{kernel.name}: {len(issued) / elements} an element"
        # a few of them are additions
        wide = count(issued, r"IMAD\.WIDE|IMAD\.HI") - 8 * turns
        assert 0 < wide <= elements * 5 * draws, f"{kernel.name}: wide multiplications"
        assert 0 < count(issued, "MUFU") <= elements * 3, f"{kernel.name}: special functions"


def test_the_step_asks_for_all_lists_before_it_waits_for_one(read):
    found = read("selective")
    lists = {"AdamW1": 5, "AdamW0": 4, "SGD1": 3, "SGD0": 2}
    for name, kernel in found.items():
        if match := FULL.match(name):
            expected = lists[match[5] + match[4]]
        elif match := re.match(r"step_mixedILb([01])ENS_\d+(AdamW|SGD)", name):
            # two loads where a list is float32
            expected = 2 * lists[match[2] + match[1]]
        else:
            continue
        loop = updates(kernel)
        loads = count(loop, r"LDG.*\.128")
        assert loads == asked_ahead(loop) == expected, f"{name}: {asked_ahead(loop)} of {loads}"


def test_mixed_steps_let_three_blocks_be_under_way(read):
    found = {
        name: kernel for name, kernel in read("selective").items() if name.startswith("step_mixed")
    }
    assert len(found) == 5, found.keys()
    for name, kernel in found.items():
        assert kernel.registers <= 80, f"{name}: {kernel.registers} registers"
        # with AMSGrad some registers' worth
        assert kernel.spilled <= (24 if "ILb1ENS_5AdamW" in name else 0), f"{name} spills"


def test_gradients_are_selected_and_gathered_by_whole_accesses(read):
    found = read("selective")
    (multiply,) = [found[name] for name in found if re.match(r"step_mixed.*NoUpdateRule", name)]
    loop = updates(multiply)
    # g and s; g
    assert count(loop, r"LDG.*\.128") == 4 and count(loop, r"STG.*\.128") == 2
    assert count(loop, "STG") == 2
    # a call of Philox serves four elements; what is not whole are ranks' tables
    assert count(loop, r"IMAD\.WIDE") <= 2 * 20 + 8 + 20
    (gathering,) = [found[name] for name in found if name.startswith("gather_full")]
    for loop in gathering.element_loops():
        assert count(loop, "LDG") == count(loop, r"LDG.*\.128")


def test_the_loss_of_short_rows_takes_two_special_functions_a_logit(read):
    found = {
        name: kernel for name, kernel in read("divergence").items() if name.startswith("loss_full")
    }
    # one or two passes in the pairs
    assert len(found) == 2, found.keys()
    for name, kernel in found.items():
        # A loop takes 8 logits of a row, or of two. What runs once a row, logarithms in double
        # above all, stands outside.
        special = [(count(loop, "MUFU"), 8) for loop in kernel.loops() if count(loop, "MUFU")]
        reads = sum(count(loop, "LDG") > 0 for loop in kernel.element_loops())
        assert special and reads, name
        per_row = sum(n for n, _ in special) / (8 * reads)
        assert per_row <= 2, f"{name}: {per_row} special functions a logit"


def test_dropout_takes_few_instructions_an_element(read):
    found = {
        name: kernel for name, kernel in read("dropout").items() if name.startswith("drop_full")
    }
    # three dtypes, forward and backward
    assert len(found) == 6, found.keys()
    for name, kernel in found.items():
        (loop,) = kernel.element_loops()
        assert len(loop) <= 8 * 24, f"{name}: {len(loop) / 8} instructions an element"
        # float32
        accesses = 2 if "E0E" in name else 1
        assert count(loop, r"LDG.*\.128") == count(loop, r"STG.*\.128") == accesses, name
        # a call of Philox serves four elements
        assert 0 < count(loop, r"IMAD\.WIDE|IMAD\.HI") <= 2 * 20 + 8, name


PERTURBING = re.compile(
    r"(squares|moved_squares|take_step)INS\d+_\d+WholeILNS_\d+StorageE(\d)EEE"
    r"(?:LNS_\d+NormE(\d)ELb(\d)ELb(\d)E)?"
)
# Instructions an element at most, in float32 and in 16 bits, of l2 and without a random mask: the
# norm, the step, from x the sum of squares and the step.
FEW = {"squares": (9, 7), "take_step": (11, 9), "moved_squares": (17, 14), "from x": (20, 18)}


def test_perturbations_take_few_instructions_an_element(read):
    found = {
        match: one
        for name, one in read("perturbation").items()
        if (match := PERTURBING.match(name))
    }
    # three dtypes: the norm, the norm after the step, and the step: l2 and linf, from x or not,
    # with a mask or not, but for linf from x with one
    assert len(found) == 3 * (2 + 7), found.keys()
    for match, kernel in found.items():
        stage, dtype, norm, from_x, random = match.groups()
        assert kernel.registers <= (80 if random == "1" else 64), kernel.name
        loops = [loop for loop in kernel.element_loops() if count(loop, "LDG")]
        lists = 2 if stage == "moved_squares" or from_x == "1" else 1
        for loop in loops:
            loads = count(loop, r"LDG.*\.128")
            assert loads == asked_ahead(loop), f"{kernel.name}: {asked_ahead(loop)} of {loads}"
            assert loads in (2, 2 * lists), kernel.name
        last = min((loop for loop in loops if count(loop, "STG") or stage != "take_step"), key=len)
        assert count(last, r"LDG.*\.128") == 2 * lists, kernel.name
        if stage == "take_step":
            assert count(last, r"STG.*\.128") == 2, kernel.name
            # without x in float where that will do
            assert (count(last, r"D(ADD|MUL|FMA)|F2F\.F(64|32\.F64)") > 0) == (from_x == "1")
        if norm != "1" and random != "1":
            wide = dtype != "0"
            most = FEW["from x" if from_x == "1" else stage][wide]
            elements = 16 if wide else 8
            assert len(last) <= most * elements, f"{kernel.name}: {len(last) / elements} an element"


# Blocks or clusters; float32, bfloat16 or float16; passes, and whether two of them are a pair.
LONG = re.compile(r"loss_long_(block|cluster)ILNS_\d+StorageE(\d)ELi(\d)ELb([01])E")


@pytest.fixture
def long_rows(read):
    found = {
        match: kernel for name, kernel in read("divergence").items() if (match := LONG.match(name))
    }
    assert len(found) == 2 * 3 * 4, found.keys()
    return found


def test_long_rows_keep_to_registers(long_rows):
    for kernel in long_rows.values():
        assert (kernel.stack, kernel.spilled) == (0, 0), f"{kernel.name} spills"
        assert not [text for _, text in kernel.instructions if re.match("LDL|STL", opcode(text))]
        copies = [text for _, text in kernel.instructions if "LDGSTS" in text]
        assert copies and all(".128" in text for text in copies), f"{kernel.name}: narrow copies"


def test_long_rows_take_few_instructions_a_logit(long_rows):
    for match, kernel in long_rows.items():
        if match[3] + match[4] != "31":
            continue
        # The loops that read rows. Of two that do the same, the longer one is for rows far out, far
        # apart, or with a class that dominates or an infinite logit; without special functions and
        # maxima it is for smoothing.
        loops = [loop for loop in kernel.loops() if count(loop, r"LDS.*\.128") >= 2]
        wide = match[2] == "0"
        logits = 12 if wide else 24
        writing = [loop for loop in loops if count(loop, r"STG.*\.128")]
        pairs = [loop for loop in loops if count(loop, r"LDS.*\.128") == 2 and count(loop, "MUFU")]
        sums = [
            loop
            for loop in loops
            if count(loop, r"LDS.*\.128") == 3 and count(loop, "MUFU") == logits
        ]
        maxima = [
            loop
            for loop in loops
            if not count(loop, "MUFU") and count(loop, r"[FHV]\w*MNMX") and not count(loop, "STG")
        ]
        assert [len(writing), len(pairs), len(sums), len(maxima)] == [2, 2, 2, 1], kernel.name
        main = [*maxima[0], *(text for two in (sums, pairs, writing) for text in min(two, key=len))]
        most = 48 if wide else 28
        assert len(main) <= most * logits, f"{kernel.name}: {len(main) / logits} a logit"
        special = count(main, "MUFU") / logits
        assert special <= 3.4, f"{kernel.name}: {special} special functions a logit"
        # a label is looked for once a chunk
        assert count(min(writing, key=len), "ISETP") <= 16, kernel.name


# BERT, GPT-2, RoBERTa
@pytest.mark.parametrize("classes", [30_522, 50_257, 50_265])
def test_real_vocabularies_cost_little_more_than_aligned_rows(long_rows, classes):
    """A row that begins anywhere has a chunk more, and two chunks in part, which go element by
    element: a warp each for all of it.
    """
    for match, kernel in long_rows.items():
        if match[3] + match[4] != "31":
            continue
        columns = 4 if match[2] == "0" else 8
        main = len(gpu_model.main_path(kernel))
        spans = [span for span in kernel.spans() if len(kernel.body(span)) < 3 * main]
        inner = kernel.innermost(spans)
        # the gradients of a chunk in part, of which each pass's leave by columns
        gradients = []
        for span in spans:
            body = kernel.body(span)
            if count(body, "MUFU") >= 10 * columns / 3 and count(body, r"STS|ST\."):
                loops = [one for one in inner if span[0] <= one[0] and one[1] <= span[1]]
                gradients.append(
                    len(body) + (columns - 1) * sum(len(kernel.body(one)) for one in loops)
                )
        # of usual rows, and of others
        assert len(gradients) >= 2, (kernel.name, gradients)
        # what is no class is filled, for the maxima and after them, in 10 instructions an element
        in_part = 2 * 10 * columns * 3 + min(gradients)
        warps = classes / columns / 32
        issued = main * (warps + 1) + 2 * in_part
        assert issued <= 1.15 * main * warps, f"{kernel.name}: {issued / (main * warps)}"


MANY = re.compile(r"loss_many_(block|cluster)ILNS_\d+StorageE(\d)E")


def test_many_passes_and_soft_labels_go_by_whole_accesses(read):
    found = {match: one for name, one in read("divergence").items() if (match := MANY.match(name))}
    assert len(found) == 2 * 3, found.keys()
    for match, kernel in found.items():
        assert (kernel.stack, kernel.spilled) == (0, 0), f"{kernel.name} spills"
        copies = [text for _, text in kernel.instructions if "LDGSTS" in text]
        assert len(copies) >= 2 and all(".128" in text for text in copies), kernel.name
        # the loop over the other passes, of the divergences or of the gradients: a logit beside one
        columns = 4 if match[2] == "0" else 8
        pairs = [
            loop
            for loop in kernel.loops()
            if count(loop, "MUFU") == columns and count(loop, r"LDS.*\.128")
        ]
        assert pairs and max(map(len, pairs)) <= 34 * columns, kernel.name
        assert count(kernel.body((0, 1 << 30)), r"STG.*\.128") >= 2, kernel.name


def test_long_rows_meet_without_a_barrier_of_the_whole_gpu(long_rows, arch):
    for match, kernel in long_rows.items():
        places = [at for at, text in kernel.instructions if re.search(r"MEMBAR\S*GPU", text)]
        sent = [at for at, text in kernel.instructions if re.match(r"STAS|ST\.ASYNC", opcode(text))]
        # whose clusters are never launched
        if match[1] == "block" or arch == "sm_80":
            assert not places and not sent, kernel.name
            continue
        # as the kernel begins, and before it ends
        assert len(places) == 2 and places[0] < min(sent) <= max(sent) < places[1], kernel.name
        passes, pairs = int(match[3]), match[4] == "1"
        # of the pairs a second time where logits are infinite
        assert len(sent) == passes + 3 * passes + 4 * pairs, f"{kernel.name}: {len(sent)} sent"


def test_the_model_of_the_kernels_is_of_this_code(read, arch):
    document = json.loads(gpu_model.RESULTS.read_text())
    if document["compiler"].split(", ")[-1] not in nvcc_version():
        pytest.skip("another compiler made the model")
    cases = {case.name: case for case in gpu_model.CASES}
    lines = [line for line in document["records"] if line["arch"] == arch]
    assert lines
    for line in lines:
        found = gpu_model.measured(cases[line["case"]], arch)
        assert found == line["code"], f"{line['case']}: run `python -m bench.gpu_model`"


# ---- What they compute, on a host


@pytest.fixture(scope="session")
def on_host() -> pathlib.Path:
    """Loads the CUDA operators compiled for a CPU, under the name of the baseline's library."""
    if not shutil.which("c++") or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",
    ]
    stand_ins = ['-DLOOPS="loops_cuda.cuh"', '-DINSTRUCTIONS="instructions.h"']
    definitions = [
        *DEFINITIONS,
        "-DHAS_CLUSTERS=1",
        "-DARCHITECTURES=8.0/9.0a/10.0+PTX",
        *stand_ins,
    ]
    command = [
        "c++",
        *flags,
        *definitions,
        *INCLUDES,
        "-Ipython_tests/cuda_on_host",
        "-x",
        "c++",
        "-c",
    ]
    host = ROOT / "python_tests/cuda_on_host"
    sources = [*SOURCES.values(), host / "library.cpp"]

    def make(folder: pathlib.Path) -> None:
        objects = [folder / f"{path.stem}.o" for path in sources]
        list(
            WORKERS.map(
                lambda pair: run(*command, pair[0], "-o", pair[1]),
                zip(sources, objects, strict=True),
            )
        )
        link = (
            "-Wl,-Bsymbolic",
            "-Wl,-z,defs",
            "-Wl,--no-as-needed",
            f"-L{TORCH}/lib",
            "-ltorch_cpu",
        )
        run("c++", "-shared", *objects, "-o", folder / "uegr_kernels_baseline.so", *link)

    return kept("on_host", command, [*HEADERS, *sources, *sorted(host.glob("*.h"))], make)


def test_every_function_of_both_sides_runs_on_a_host():
    """A function for hosts and devices is called by what a host compiles: the CPU's sources,
    the CUDA sources above, the bindings.
    """
    headers = {path: path.read_text() for path in (ROOT / "csrc").rglob("*.h")}
    code = "\n".join(
        [
            *headers.values(),
            *(
                path.read_text()
                for ending in ("cpp", "cu", "cuh")
                for path in (ROOT / "csrc").rglob(f"*.{ending}")
            ),
        ]
    )
    names = {
        name
        for text in headers.values()
        for name in re.findall(r"(?:HOST_DEVICE|CALLED_ON_BOTH)\b[^;={}()\n]*?(\w+)\(", text)
    }
    assert {
        "philox",
        "power_of_two",
        "drawn_factor",
        "add_log_ratios",
        "direction_factor",
        "dropped",
    } <= names
    for name in names:
        definitions = len(
            re.findall(rf"(?:HOST_DEVICE|CALLED_ON_BOTH)\b[^;={{}}()\n]*?\b{name}\(", code)
        )
        assert len(re.findall(rf"\b{name}\b", code)) > definitions, f"nothing calls {name}"


# A choice of each operator's own tests: every option, dtype and layout comes up in the random
# cases; float64 is not for these kernels.
CHOICES = {
    "selective": "random_cases_agree or neutral_equals_torch or global_rank or (previous and "
    "strided) or nonfinite",
    "divergence": "half_precision or parts or regression or as_labels or ignored or minus_infinity "
    "or literals or backward_writes",
    # which is for large tensors
    "perturbation": "not number_of_threads",
    "dropout": "cpp",
}


def pytest_on(library: pathlib.Path | None, *arguments, **variables) -> None:
    """Runs the CPU's tests on a library of CUDA operators for a host, or on the CPU's own."""
    environment = {
        **os.environ,
        **variables,
        "CUDA_ON_HOST": str(library),
        "UEGR_KERNELS_ISA": "baseline",
        "PYTHONPATH": os.pathsep.join(
            [f"{ROOT / 'python_tests/cuda_on_host'}", f"{ROOT}", os.environ.get("PYTHONPATH", "")]
        ),
    }
    options = ("-q", "-x", "-p", "no:cacheprovider", *(("-p", "plugin") if library else ()))
    assert " passed" in run(sys.executable, "-m", "pytest", *options, *arguments, env=environment)


@pytest.mark.parametrize("operator", CHOICES)
def test_what_they_compute_passes_the_tests_of_the_cpu(on_host, operator):
    pytest_on(
        on_host,
        "-k",
        f"cpp and not float64 and ({CHOICES[operator]})",
        ROOT / "python_tests" / operator_tests(operator),
    )


def test_what_they_compute_of_long_rows_and_many_items(on_host):
    pytest_on(on_host, ROOT / "python_tests/cuda_on_host/large.py")


@pytest.mark.parametrize("on_gpu", [True, False], ids=["cuda", "cpp"])
@pytest.mark.parametrize(
    "cases",
    [
        # what would stay as it is is not written
        "unwritten.py",
        # the losses take labels without another pass
        "labels_alone.py",
    ],
)
def test_both_libraries_pass(request, cases, on_gpu):
    pytest_on(
        request.getfixturevalue("on_host") if on_gpu else None,
        ROOT / "python_tests/cuda_on_host" / cases,
    )


def test_a_gpu_that_the_library_has_no_code_for_is_served_by_others(on_host):
    pytest_on(
        on_host, ROOT / "python_tests/cuda_on_host/without_code.py", CUDA_ON_HOST_REFUSES="code"
    )


# ---- The package around them


def test_a_torch_without_cuda_never_loads_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    (tmp_path / "uegr_kernels_cuda.so").write_text("no library")
    assert native.why_not_cuda.__wrapped__() == (
        "this torch is built without CUDA; install a CUDA build of torch"
    )


def test_a_missing_library_is_one_sentence_with_reason_and_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    assert re.fullmatch(
        r"the CUDA library was not built: .* \(install the CUDA toolkit, for nvcc\); .*pip "
        r"install.*",
        native.why_not_cuda.__wrapped__(),
    )
    (tmp_path / "cuda_not_built.txt").write_text("the cat sat on nvcc (lift the cat)\n")
    assert (
        "was not built: the cat sat on nvcc (lift the cat); "
    ) in native.why_not_cuda.__wrapped__()
    (tmp_path / "uegr_kernels_cuda.so").write_text("no library")
    assert "does not load into torch" in native.why_not_cuda.__wrapped__()


def test_float64_is_refused_with_a_reason():
    reason = backends.why_not(
        "cuda", "selective.selective_adamw_", torch.device("cuda"), torch.float64
    )
    assert "float64" in reason and "triton" in reason


# A GPU as torch and the CUDA library describe it: name, architecture, what the library's probe
# answers.
H200 = ("NVIDIA H200", (9, 0), "cudaSuccess")
V100 = ("Tesla V100", (7, 0), "cudaErrorNoKernelImageForDevice")
L4 = ("NVIDIA L4", (8, 9), "cudaErrorUnsupportedPtxVersion")
STEP = "selective.selective_adamw_"
NO_LIBRARY = (
    "the CUDA library was not built: nvcc was not found (install the CUDA toolkit); put that right"
)


@pytest.fixture
def machine(monkeypatch):
    """Feigns GPUs, torch's build and the CUDA library; returns what was asked of the probe."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caches = (backends._why_not, native.why_not_gpu, native.why_not_triton)

    def feign(
        *gpus,
        cuda="13.0",
        hip=None,
        no_library=None,
        driver="13.0",
        held=("8.0", "9.0a", "10.0+PTX"),
        names=None,
    ):
        for cache in caches:
            cache.cache_clear()
        asked = []

        def probe(index):
            asked.append(index)
            return (
                gpus[index][2]
                if gpus
                else "cudaErrorInsufficientDriver"
                if driver == "0.0"
                else "cudaErrorNoDevice"
            )

        def properties(index):
            name, (major, minor), _ = gpus[index]
            return types.SimpleNamespace(
                name=name, major=major, minor=minor, gcnArchName=f"gfx{major}{minor:x}2:xnack-"
            )

        cuda_of_torch = {
            "is_available": lambda: bool(gpus),
            "device_count": lambda: len(gpus),
            "is_initialized": lambda: bool(gpus),
            "current_device": lambda: len(gpus) - 1,
            "get_device_properties": properties,
            "get_device_capability": lambda index: gpus[index][1],
        }
        for name, answer in cuda_of_torch.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        without = (
            ("this torch is built without CUDA; install a CUDA build of torch")
            if cuda is None
            else no_library
        )
        library = {
            "why_not_cuda": without,
            "has_kernel": True,
            "architectures": held,
            "versions": (driver, "13.0"),
        }
        for name, answer in library.items():
            monkeypatch.setattr(native, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(native, "probe", probe)
        return asked

    yield feign
    for cache in caches:
        cache.cache_clear()


def gpu(index: int | None = None) -> torch.device:
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def test_auto_takes_what_each_gpu_runs_and_asks_it_once(machine):
    asked = machine(H200, V100, L4)
    for _ in range(2):
        for operator in (
            STEP,
            "divergence.uegr_loss",
            "dropout.adaptive_dropout",
            "perturbation.pgd_step_",
        ):
            for dtype in (torch.float32, torch.bfloat16):
                taken = [backends.choose("auto", operator, gpu(i), dtype) for i in range(3)]
                assert taken == ["cuda", "reference", "triton"]
                # the current one, which is the last
                assert backends.choose("auto", operator, gpu(), dtype) == "triton"
    assert sorted(asked) == [0, 1, 2]
    assert backends.choose("auto", STEP, gpu(0), torch.float64) == "triton"


@pytest.mark.parametrize(
    ("answer", "driver", "words"),
    [
        (
            "cudaErrorInsufficientDriver",
            "12.4",
            ("made for CUDA 12.4", "the 13.0 that", "update the driver"),
        ),
        ("cudaErrorInsufficientDriver", "0.0", ("no NVIDIA driver", "install one")),
        (
            "cudaErrorNoKernelImageForDevice",
            "13.0",
            ("8.0, 9.0a, 10.0+PTX", "a 8.6", "TORCH_CUDA_ARCH_LIST=8.6", "pip install"),
        ),
        ("cudaErrorInvalidDeviceFunction", "13.0", ("TORCH_CUDA_ARCH_LIST=8.6",)),
        ("cudaErrorNoDevice", "13.0", ("finds no GPU", "CUDA_VISIBLE_DEVICES")),
        (
            "cudaErrorECCUncorrectable",
            "13.0",
            ("cudaErrorECCUncorrectable on GPU 0", "other programs"),
        ),
    ],
)
def test_what_the_probe_answers_is_a_sentence(machine, answer, driver, words):
    machine(("NVIDIA A10", (8, 6), answer), driver=driver)
    reason = backends.why_not("cuda", STEP, gpu(0))
    assert all(word in reason for word in words), reason
    assert backends.choose("auto", STEP, gpu(0)) == "triton"
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        backends.choose("cuda", STEP, gpu(0))


def test_an_architecture_below_the_kernels_names_another_backend(machine):
    machine(V100)
    assert "need 8.0 or newer; use backend='auto'" in backends.why_not("cuda", STEP, gpu(0))
    assert "GPU 0 is a 7.0; use backend='auto'" in backends.why_not("triton", STEP, gpu(0))


def test_rocm_takes_triton(machine):
    asked = machine(("AMD Instinct MI300X", (9, 4), None), cuda=None, hip="6.4")
    assert backends.choose("auto", STEP, gpu(0)) == "triton" and not asked


@pytest.mark.parametrize(
    ("known", "backend", "words"),
    [
        ({"cuda": None}, "cuda", ["built without CUDA; install a CUDA build"]),
        ({"cuda": None}, "triton", ["built without CUDA and ROCm; install"]),
        ({"no_library": NO_LIBRARY}, "cuda", [NO_LIBRARY, "torch finds no GPU"]),
        ({"driver": "0.0"}, "cuda", ["no NVIDIA driver was found; install one"]),
        ({}, "cuda", ["the driver finds no GPU"]),
        ({}, "triton", ["torch finds no GPU or no driver"]),
        ({"cuda": None, "hip": "6.4"}, "triton", ["torch finds no GPU or no driver"]),
    ],
    ids=str,
)
def test_tensors_on_the_cpu_are_told_that_moving_them_would_not_do(machine, known, backend, words):
    machine(**known)
    with pytest.raises(RuntimeError) as caught:
        uk.pairwise_js(torch.zeros(2, 3, 4), backend=backend)
    for word in ("these are on cpu", "moving them alone would not do", *words):
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tensors_on_the_cpu_are_told_to_move_where_that_does(machine, backend):
    # the current one is the last
    machine(V100, H200)
    with pytest.raises(RuntimeError, match="these are on cpu; move them, or use backend='auto'"):
        uk.pairwise_js(torch.zeros(2, 3, 4), backend=backend)
    machine(V100)
    with pytest.raises(RuntimeError, match="moving them alone would not do: .* 8.0 "):
        uk.pairwise_js(torch.zeros(2, 3, 4), backend=backend)


def test_info_says_of_each_gpu_what_runs_on_it_and_why(machine):
    machine(H200, V100, L4)
    lines = dict(re.findall(r"^(GPU \d|  \w+) +(.*)$", program.info(), re.MULTILINE))
    held, library = "(8.0, 9.0a, 10.0+PTX)", "the CUDA library holds"
    assert lines["GPU 0"] == f"NVIDIA H200, sm_90; {library} code for it {held}; auto takes cuda"
    refused = re.escape(
        f"Tesla V100, sm_70; {library} no code for it {held}; auto takes reference;"
    )
    assert re.match(
        rf"{refused} not cuda: {library} .*; not triton: Triton "
        r"supports",
        lines["GPU 1"],
    )
    assert lines["GPU 2"].startswith(
        f"NVIDIA L4, sm_89; {library} code for it {held}; auto takes triton; not cuda: "
    )
    assert (
        lines["  cuda"].startswith("usable on cuda:0;")
        and lines["  triton"] == "usable on cuda:0 and cuda:2"
    )


def test_info_on_rocm_without_a_library_and_without_a_gpu(machine):
    machine(("AMD Instinct MI300X", (9, 4), None), cuda=None, hip="6.4")
    text = program.info()
    assert (
        "AMD Instinct MI300X, gfx942:xnack-; no CUDA library is loaded; auto takes triton; not "
        "cuda: this torch is built"
    ) in text
    machine(H200, no_library=NO_LIBRARY)
    assert (
        f"NVIDIA H200, sm_90; no CUDA library is loaded; auto takes triton; not cuda: {NO_LIBRARY}"
    ) in program.info()
    machine(driver="0.0")
    text = program.info()
    assert "GPU           none: torch finds no GPU or no driver here" in text
    assert re.search(
        r"^  cuda +not usable: no NVIDIA driver was found[^;]*; install "
        r"one$",
        text,
        re.MULTILINE,
    )


@pytest.mark.parametrize(
    ("held", "runs", "not_on"),
    [
        (("8.0",), ["8.0", "8.6", "8.9"], ["7.5", "9.0", "12.0"]),
        (("9.0a",), ["9.0"], ["8.0", "9.1", "10.0"]),
        (("10.0f",), ["10.0", "10.3"], ["9.0", "12.0"]),
        (("8.6", "9.0+PTX"), ["8.6", "9.0", "12.0"], ["8.0"]),
        (("9.0a+PTX", "10.0f+PTX"), ["9.0", "10.3"], ["8.9", "12.0"]),
    ],
)
def test_code_runs_on_its_architectures_line_and_ptx_on_later_ones(machine, held, runs, not_on):
    machine(held=held)
    for number in (*runs, *not_on):
        assert native.holds_code(tuple(map(int, number.split(".")))) == (number in runs), number


def test_the_dispatchers_gpu_kernel_is_one_that_the_gpu_runs(machine, monkeypatch):
    machine(V100, L4, no_library=NO_LIBRARY)
    kernels = {}
    monkeypatch.setattr(torch.library, "define", lambda *_: None)
    monkeypatch.setattr(
        torch.library, "impl", lambda name, key, function: kernels.setdefault((name, key), function)
    )
    backends.define(
        "step",
        "(Tensor[] x, *, int y) -> ()",
        lambda x, *, y: ("reference", y),
        lambda x, *, y: ("triton", y),
    )
    with FakeTensorMode():
        for overload in ("step", "step.fallback"):
            kernel = kernels[f"uegr_kernels::{overload}", "CUDA"]
            assert [kernel([torch.empty(2, device=gpu(i))], y=7) for i in (0, 1)] == [
                ("reference", 7),
                ("triton", 7),
            ]
    kernels.clear()
    # with the library loaded its own kernels are the dispatcher's
    machine(H200)
    backends.define(
        "step", "(Tensor[] x, *, int y) -> ()", lambda *_, **__: None, lambda *_, **__: None
    )
    assert ("uegr_kernels::step", "CUDA") not in kernels and (
        "uegr_kernels::step.fallback",
        "CUDA",
    ) in kernels


def test_the_probe_of_the_runtime_itself(tmp_path, monkeypatch):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed: the CUDA sources are not compiled here")
    (tmp_path / "probe.cu").write_text('#include "core/probe.cuh"\n')
    words, names = build_cuda().architectures("8.0;10.0+PTX"), "-DARCHITECTURES=8.0/10.0+PTX"
    flags = (
        "-shared",
        "-std=c++17",
        "-cudart",
        "static",
        "-Icsrc",
        "-Xcompiler",
        "-fPIC,-Wall,-Wextra",
        "-Werror",
        "all-warnings",
    )
    run(
        "nvcc",
        *flags,
        names,
        *" ".join(words).split(),
        tmp_path / "probe.cu",
        "-o",
        tmp_path / "probe.so",
    )
    library = native.load_functions(tmp_path / "probe.so")
    monkeypatch.setattr(native, "_cuda_library", lambda: library)
    driver, built = native.versions()
    assert f"release {built}" in nvcc_version() and native.architectures() == ("8.0", "10.0+PTX")
    answers = (
        ("cudaErrorInsufficientDriver",)
        if driver == "0.0"
        else ("cudaSuccess", "cudaErrorNoDevice", *native.NO_CODE)
    )
    assert native.probe(0) in answers and native.probe(0) == native.probe(0)


def test_asking_a_gpu_takes_memory_on_no_other(tmp_path):
    if not shutil.which("c++") or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    (tmp_path / "ask.cpp").write_text(
        '#include "core/platform.h"\n#include "core/probe.cuh"\n'
        "int main() { return uegr::probe_device(3) == cudaSuccess && devices_in_use == 1u << 3 ? 0 "
        ": 1; }\n"
    )
    flags = (
        "-std=c++17",
        "-pthread",
        "-DUSE_CUDA",
        "-DARCHITECTURES=8.0",
        "-Icsrc",
        "-Ipython_tests/cuda_on_host",
    )
    run("c++", *flags, tmp_path / "ask.cpp", "-o", tmp_path / "ask")
    run(tmp_path / "ask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fake_tensors_of_a_gpu_are_served(monkeypatch, dtype):
    # the reference needs more of a GPU than a CPU build of torch can feign
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    torch.compiler.reset()
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda", dtype=dtype)
        dropout = uk.AdaptiveDropout(4)
        wide = torch.promote_types(dtype, torch.float32)
        # a CPU build of torch moves none
        dropout.gradient_norm, dropout.pending = torch.empty(2, 4, device="cuda", dtype=wide)
        for call in (
            lambda: uk.pairwise_js(x),
            lambda: uk.fgm_perturbation(x, 0.1),
            lambda: uk.selection_mask(x, seed=1, step=1),
            lambda: dropout(x),
        ):
            for served in (call(), torch.compile(call, backend="eager", fullgraph=True)()):
                assert served.device.type == "cuda"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("8.0", ["-gencode arch=compute_80,code=sm_80"]),
        (
            "9.0a 10.0+PTX",
            [
                f"-gencode arch=compute_{code.split('_')[1]},code={code}"
                for code in ("sm_90a", "sm_100", "compute_100")
            ],
        ),
    ],
)
def test_the_build_takes_architectures_as_torch_does(names, words):
    assert build_cuda().architectures(names) == words
    with pytest.raises(ValueError, match="'Hopper' .*give numbers"):
        build_cuda().architectures("8.0;Hopper")


def test_the_build_tells_the_library_what_it_holds_code_for(tmp_path):
    text = build_cuda().ninja_text(
        tmp_path, tmp_path, tmp_path / "library.so", "nvcc", "8.0; 9.0a 10.0+PTX"
    )
    assert " -DARCHITECTURES=8.0/9.0a/10.0+PTX " in text


def test_the_library_itself_compiles(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed: the CUDA sources are not compiled here")
    flags = [*build_cuda().FLAGS.split(), "-DARCHITECTURES=8.0", "-arch=sm_80"]
    run(
        "nvcc",
        *flags,
        *DEFINITIONS[:1],
        *INCLUDES[1:],
        "-c",
        "csrc/library_cuda.cpp",
        "-o",
        tmp_path / "library.o",
    )


def build_cuda() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc/build_cuda.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build
