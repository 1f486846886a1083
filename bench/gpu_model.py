"""What the kernels can reach on GPUs, calculated from their compiled code and from data sheets:
`python -m bench.gpu_model` compiles the CUDA sources for NVIDIA's and Triton's kernels for AMD's,
writes bench/results/gpu_model.json and makes docs/performance_gpu.md of it. No GPU is needed, and
none has confirmed it.
"""

import importlib.metadata
import json
import pathlib
import re
import typing

from bench import cuda_code, tables, triton_code
from bench.cuda_code import Kernel, count

RESULTS = cuda_code.ROOT / "bench/results/gpu_model.json"
PAGE = cuda_code.ROOT / "docs/performance_gpu.md"
# of the data sheet's rate: what a copy reaches
COPY = 0.9
# s, of memory under load
LATENCY = 0.8e-6


class Gpu(typing.NamedTuple):
    """Holds a data sheet. A multiprocessor's rates are by clock, in lanes."""

    name: str
    arch: str
    multiprocessors: int
    # Hz
    clock: float
    # bytes/s
    rate: float
    # float32
    lanes: int
    # lanes of float64
    doubles: int
    # bytes a block may take
    shared: int
    clusters: bool = True
    issued: int = 128
    # conversions between float32 and float64 too
    special: int = 16
    # 32-bit products of 64 bits: assumed, no data sheet says so
    wide: int = 32
    registers: int = 65536
    threads: int = 2048


GPUS = (
    Gpu("A100 80GB", "sm_80", 108, 1.41e9, 2.04e12, 64, 32, 163 << 10, clusters=False),
    Gpu("H100 SXM", "sm_90a", 132, 1.98e9, 3.35e12, 128, 64, 227 << 10),
    Gpu("H200", "sm_90a", 132, 1.98e9, 4.8e12, 128, 64, 227 << 10),
    Gpu("B200", "sm_100", 148, 1.965e9, 8.0e12, 128, 64, 227 << 10),
)
# A compute unit's. Vector instructions: those of scalars and branches have units of their own.
MI300X = Gpu(
    "MI300X", "gfx942", 304, 2.1e9, 5.3e12, 128, 64, 64 << 10, clusters=False, issued=64,
    wide=16, registers=131072,
)  # fmt: skip


class Case(typing.NamedTuple):
    """Holds a kernel and what one element of it moves. `rows`: bytes of shared memory that copies
    fill at a time, for kernels that keep rows.
    """

    name: str
    operator: str
    # a pattern
    kernel: str
    # of a turn of the loops
    elements: int
    # bytes an element
    read: float
    written: float
    threads: int = 256
    # of a loop inside
    turns: int = 1
    # statistics are taken first, 16 bytes a turn, unrolled by four
    gathers: bool = False
    rows: int = 0


class TritonCase(typing.NamedTuple):
    """Holds a statement, which of its launches of a kernel is meant, and what an element moves."""

    name: str
    statement: str
    kernel: str
    # bytes an element
    read: float
    written: float
    launch: int = 0
    gathers: bool = False


NORM = r"squaresINS\d+_\d+WholeILNS_\d+StorageE{dtype}E"
STEP = r"take_stepINS\d+_\d+WholeILNS_\d+StorageE{dtype}EEELNS_\d+NormE0ELb{from_x}ELb0E"
ADAMW = r"Lb{previous}ELb0ELb0ENS_\d+AdamW"
CASES = (
    Case(
        "AdamW, float32", "selective", "step_fullIf" + ADAMW.format(previous=0), 4, 16, 12,
        gathers=True,
    ),
    Case('AdamW, float32, "previous"', "selective", "step_fullIf" + ADAMW.format(previous=1),
         4, 16, 12),
    Case(
        "AdamW, all bfloat16", "selective", "step_fullIt" + ADAMW.format(previous=0), 8, 8, 6,
        turns=2, gathers=True,
    ),
    Case('AdamW, all bfloat16, "previous"', "selective", "step_fullIt" + ADAMW.format(previous=1),
         8, 8, 6, turns=2),
    # theta and g of 2 bytes, m and v of 4
    Case('AdamW, bfloat16, moments in float32, "previous"', "selective",
         r"step_mixedILb0ENS_\d+AdamW", 8, 12, 10),
    Case("loss, float32, C = 32,000", "divergence", r"loss_long_clusterILNS_\d+StorageE0ELi3ELb1",
         12, 4, 4, threads=512, rows=3 * 4 * 16000),
    Case("loss, bfloat16, C = 32,000", "divergence", r"loss_long_blockILNS_\d+StorageE1ELi3ELb1",
         24, 2, 2, threads=512, rows=3 * 2 * 32000),
    Case("dropout, float32, forward", "dropout", r"drop_fullILNS_\d+StorageE0ELb0", 8, 4, 4),
    Case("dropout, bfloat16, forward", "dropout", r"drop_fullILNS_\d+StorageE1ELb0", 8, 2, 2),
    Case("dropout, bfloat16, backward", "dropout", r"drop_fullILNS_\d+StorageE1ELb1", 8, 2, 2),
    Case("FGM, float32, the norm", "perturbation", NORM.format(dtype=0), 8, 4, 0),
    Case("FGM, float32, the step", "perturbation", STEP.format(dtype=0, from_x=0), 8, 4, 4),
    Case("FGM, bfloat16, the norm", "perturbation", NORM.format(dtype=1), 16, 2, 0),
    Case("FGM, bfloat16, the step", "perturbation", STEP.format(dtype=1, from_x=0), 16, 2, 2),
    Case("PGD, float32, the step", "perturbation", STEP.format(dtype=0, from_x=1), 8, 8, 4),
)  # fmt: skip


PARAMETER = "p = torch.zeros(1 << 16, dtype=torch.{0}, requires_grad=True); p.grad = p.detach(); "
ADAMW_STEP = PARAMETER + "uk.SelectiveAdamW([p], state_dtype={1}, statistics={2!r}).step()"
LOSS = (
    "uk.uegr_loss(torch.zeros(4, 32000, dtype=torch.{0}, requires_grad=True), torch.zeros(2, 4, "
    "32000, dtype=torch.{0}, requires_grad=True), torch.zeros(4, dtype=torch.long))"
)
DROPOUT = (
    "uk.AdaptiveDropout(3072)(torch.zeros(64, 3072, dtype=torch.{0}, requires_grad=True))"
    ".sum().backward()"
)
FGM = "uk.fgm_perturbation(torch.zeros(16, 128, 768, dtype=torch.{0}), 0.1)"
PGD = "x = torch.zeros(16, 128, 768); uk.pgd_step(x, x, step_size=0.1, radius=1.0)"
TRITON_CASES = (
    TritonCase("AdamW, float32", ADAMW_STEP.format("float32", None, "current"),
               "update_kernel", 16, 12, gathers=True),
    TritonCase('AdamW, float32, "previous"', ADAMW_STEP.format("float32", None, "previous"),
               "update_kernel", 16, 12),
    TritonCase("AdamW, all bfloat16", ADAMW_STEP.format("bfloat16", "torch.bfloat16", "current"),
               "update_kernel", 8, 6, gathers=True),
    TritonCase('AdamW, all bfloat16, "previous"',
               ADAMW_STEP.format("bfloat16", "torch.bfloat16", "previous"), "update_kernel", 8, 6),
    TritonCase("loss, float32, C = 32,000", LOSS.format("float32"), "loss_kernel", 4, 4),
    TritonCase("loss, bfloat16, C = 32,000", LOSS.format("bfloat16"), "loss_kernel", 2, 2),
    TritonCase("dropout, float32, forward", DROPOUT.format("float32"), "drop_kernel", 4, 4),
    TritonCase("dropout, bfloat16, forward", DROPOUT.format("bfloat16"), "drop_kernel", 2, 2),
    TritonCase("dropout, bfloat16, backward", DROPOUT.format("bfloat16"), "drop_kernel", 2, 2, 1),
    TritonCase("FGM, float32, the norm", FGM.format("float32"), "part_kernel", 4, 0),
    TritonCase("FGM, float32, the step", FGM.format("float32"), "part_kernel", 4, 4, 1),
    TritonCase("FGM, bfloat16, the norm", FGM.format("bfloat16"), "part_kernel", 2, 0),
    TritonCase("FGM, bfloat16, the step", FGM.format("bfloat16"), "part_kernel", 2, 2, 1),
    TritonCase("PGD, float32, the step", PGD, "part_kernel", 8, 4, 2),
)  # fmt: skip
# loads and stores of more than one element; labels and what is found of rows come by dwords
VECTOR = r"(?:global|buffer)_{0}_dwordx(\d)"
TRITON_PATTERNS = {
    "instructions": "v_|global_|buffer_|ds_",
    "special": r"v_(exp|log|rcp|rsq|sqrt|cvt_f64|cvt_f32_f64)",
    "wide": r"v_(mul_hi|mul_lo|mad_u64)_",
    "float32": r"v_(fma|add|sub|mul|fmac|pk_fma|pk_mul|pk_add)\w*_f32",
    "float64": r"v_\w+_f64",
}


def vector_bytes(loop: list[str], kind: str) -> int:
    """Returns the bytes that a thread's vector loads or stores of a loop move."""
    return sum(4 * int(found[1]) for line in loop if (found := re.match(VECTOR.format(kind), line)))


def in_triton(case: TritonCase, arch: str) -> dict[str, float]:
    """Returns what Triton's code says of a case: registers, threads, and an element's instructions.

    A loop's elements are counted by the bytes it moves. What a loss's loops read again is in the
    cache by then.
    """
    launches = [
        code for code in triton_code.assembly(case.statement, arch) if code.name == case.kernel
    ]
    code = launches[case.launch]
    reading = [loop for loop in code.loops() if vector_bytes(loop, "load")]
    storing = [loop for loop in reading if vector_bytes(loop, "store")]
    if case.kernel == "loss_kernel":
        # what comes ahead of them reads labels
        path = [loop for loop in reading if any("dwordx4" in line for line in loop)]
    else:
        # of two, the longer one is unrolled
        path = [max(storing if case.written else reading, key=len)]
    moved = vector_bytes(path[-1], "store" if case.written else "load")
    elements = moved / (case.written or case.read)
    lines = [line for loop in path for line in loop]
    values = {name: count(lines, pattern) / elements for name, pattern in TRITON_PATTERNS.items()}
    if case.gathers:
        gather = max((loop for loop in reading if loop not in storing), key=len)
        gathered = vector_bytes(gather, "load") / (case.read / 4)
        for name in ("instructions", "float32"):
            values[name] += count(gather, TRITON_PATTERNS[name]) / gathered
    ahead = min(vector_bytes(path[-1], "load"), int(case.read * elements))
    return {"registers": code.registers, "threads": 64 * code.warps, "bytes_ahead": ahead, **values}


def main_path(kernel: Kernel) -> list[str]:
    """Returns the loops of a loss over long rows: of two that do the same, the longer one is for
    rows far apart or with a class that dominates; smoothing has one of its own.
    """
    loops = [loop for loop in kernel.loops() if count(loop, r"LDS.*\.128") >= 2]
    kinds: dict[str, list[str]] = {}
    for loop in sorted(loops, key=len, reverse=True):
        special = count(loop, "MUFU") > 0
        if count(loop, r"STG.*\.128"):
            kind = "gradients"
        elif special:
            kind = "pairs" if count(loop, r"LDS.*\.128") == 2 else "sums"
        else:
            kind = "maxima" if count(loop, r"[FHV]\w*MNMX") else "smoothing"
        kinds[kind] = loop
    kinds.pop("smoothing", None)
    assert kinds.keys() == {"gradients", "pairs", "sums", "maxima"}, kernel.name
    return [text for loop in kinds.values() for text in loop]


def element_path(case: Case, kernel: Kernel) -> list[str]:
    """Returns the loop that elements pass through: of two, the longer one is in double, for factors
    that a float does not hold.
    """
    loops = [
        loop
        for loop in kernel.element_loops()
        if count(loop, "LDG") and bool(count(loop, "STG")) == bool(case.written)
    ]
    return kernel.run_through(min(loops, key=len), case.turns)


def measured(case: Case, arch: str) -> dict[str, float]:
    """Returns what the compiled code says of a case: registers, and an element's instructions."""
    found = [
        kernel
        for name, kernel in cuda_code.kernels(case.operator, arch).items()
        if re.match(case.kernel, name)
    ]
    assert len(found) == 1, (case.name, [kernel.name for kernel in found])
    kernel = found[0]
    path = main_path(kernel) if case.rows else element_path(case, kernel)
    patterns = {
        "instructions": ".",
        "special": r"MUFU|F2F\.F64|F2F\.F32\.F64",
        "wide": r"IMAD\.WIDE|IMAD\.HI",
        "float32": "FFMA|FADD|FMUL",
        "float64": "D(ADD|MUL|FMA|SETP)",
    }
    values = {name: count(path, pattern) / case.elements for name, pattern in patterns.items()}
    if case.gathers:
        (gather,) = [loop for loop in kernel.element_loops() if not count(loop, "STG|STS")]
        values["instructions"] += len(gather) / (case.elements * 4)
        values["float32"] += count(gather, patterns["float32"]) / (case.elements * 4)
    # bytes a thread asks for at a time; a list of 16 bits leaves one of two loads out
    ahead = min(16 * count(path, r"LDG.*\.128"), int(case.read * case.elements))
    return {"registers": kernel.registers, "threads": case.threads, "bytes_ahead": ahead, **values}


def predicted(case: Case | TritonCase, code: dict[str, float], gpu: Gpu) -> dict[str, typing.Any]:
    """Returns blocks and bytes under way of a multiprocessor, and the share of a copy's rate that
    the slowest part allows.
    """
    threads, rows = code["threads"], case.rows if isinstance(case, Case) else 0
    registers = -(-int(code["registers"]) // 8) * 8 * threads
    blocks = min(gpu.registers // registers, gpu.threads // threads)
    flight = rows or blocks * threads * code["bytes_ahead"]
    if rows:
        blocks = min(blocks, max(1, gpu.shared // rows))
    clocks = gpu.multiprocessors * gpu.clock
    seconds = {
        "memory": (case.read + case.written) / (COPY * gpu.rate),
        "loads under way": case.read * LATENCY / (flight * gpu.multiprocessors),
        "instructions": code["instructions"] / (gpu.issued * clocks),
        "special functions": code["special"] / (gpu.special * clocks),
        "wide products": code["wide"] / (gpu.wide * clocks),
        "float32 arithmetic": code["float32"] / (gpu.lanes * clocks),
        "float64 arithmetic": code["float64"] / (gpu.doubles * clocks),
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return {
        "blocks": int(blocks),
        "flight": int(flight),
        "share": seconds["memory"] / seconds[limit],
        "limit": limit,
        "next": sorted(seconds, key=lambda name: seconds[name])[-2],
    }


def served(case: Case, gpu: Gpu) -> bool:
    """Returns whether a GPU has the memory, and the clusters, for a case."""
    return case.rows <= gpu.shared and (gpu.clusters or "cluster" not in case.kernel)


def records() -> list[dict[str, typing.Any]]:
    """Compiles for every GPU and returns a record a case and GPU."""
    lines = []
    for case in CASES:
        for gpu in (gpu for gpu in GPUS if served(case, gpu)):
            code = measured(case, gpu.arch)
            lines.append(record(case, code, gpu))
    for case in TRITON_CASES:
        lines.append(record(case, in_triton(case, MI300X.arch), MI300X))
    return lines


def record(case: Case | TritonCase, code: dict[str, float], gpu: Gpu) -> dict[str, typing.Any]:
    """Returns what is kept of a case on a GPU; `bytes`: an element's."""
    facts = {"case": case.name, "gpu": gpu.name, "arch": gpu.arch}
    moved = {"bytes": case.read + case.written}
    return facts | moved | {"code": code} | predicted(case, code, gpu)


def page(document: dict[str, typing.Any]) -> str:
    """Returns the page as Markdown."""
    heads = ["kernel", "GPU", "registers", "blocks", "KB under way", "bytes", "instructions"]
    heads += ["special", "wide", "of a copy", "limited by"]
    rows = []
    for line in document["records"]:
        code = line["code"]
        rows.append(
            [
                line["case"],
                line["gpu"],
                str(code["registers"]),
                str(line["blocks"]),
                f"{line['flight'] / 1024:.0f}",
                f"{line['bytes']:.0f}",
                f"{code['instructions']:.1f}",
                f"{code['special']:.2f}",
                f"{code['wide']:.1f}",
                f"{line['share']:.0%}",
                f"{line['limit']}, then {line['next']}",
            ]
        )
    return f"""# What the kernels can reach on GPUs

**Everything on this page is calculated**, by `python -m bench.gpu_model`, from the compiled code
({document["compiler"]}; for MI300X, which has Triton's kernels alone, Triton
{document["triton"]}) and the GPUs' data sheets. No GPU has confirmed it. A row says what a
multiprocessor has (registers a thread, blocks, loads under way), what an element, or a logit, costs
(bytes that must move, instructions, special functions, products of 64 bits), and which share of a
copy's rate the slowest of these allows, as if all others hid behind it.

A copy is taken to reach {COPY:.0%} of the data sheet's rate, a load to take {LATENCY * 1e6:.1f} us.
Instructions are those of the loops over elements, what runs seldom included. Lanes a clock: 128
instructions, 16 special functions, 32 wide products (assumed). Conversions between float32 and
float64 count as special functions. Joins between threads, launches and tails are left out. The loss
has two passes in the pairs beside the clean one; one block reads its rows in 16 bits, two in
float32, where there are clusters and memory for that. The step with moments of another dtype holds
an arm for each dtype and option, which are all counted here: its share is at least this. A
perturbation visits the gradient for the norm and again for the step; what the L2 still holds of it
by then is left out.

Of MI300X a compute unit's vector instructions are counted (gfx942; scalar ones run beside them), 64
lanes a clock, 16 for special functions, conversions of float64 and 32-bit products (assumed). What
a loss's loops read again is taken to come from the cache.

{tables.table(heads, rows)}
"""


def main() -> None:
    compiler = re.search(r"release [\d.]+, V[\d.]+", cuda_code.nvcc_version())
    document = {
        "compiler": "nvcc " + compiler[0] if compiler else "nvcc",
        "triton": importlib.metadata.version("triton"),
        "records": records(),
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    write_page()


def write_page(to: pathlib.Path = PAGE) -> None:
    """Makes the page of the results."""
    to.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
