"""Triton kernels compiled ahead of time for GPUs that are not here, and what the compilers made of
them.

Statements run as they stand, on small CPU tensors, with the Triton backend chosen; a launch
compiles its kernel for a target in the place of running it. All of it happens in processes of their
own, since this one may have decorated its kernels for the interpreter, and there are several
versions of Triton: the one that is installed, and 3.6.0, which torch 2.11 brings, in a folder of
its own.
"""

import collections
import concurrent.futures
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import typing

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")
ROOT = pathlib.Path(__file__).parent.parent
# `make` puts it there
OLD = ROOT / "build/triton-3.6.0"
VERSIONS = {"installed": None, "3.6.0": OLD}
# bytes a kernel
MOST_SPILLED = 16


class Kernel(typing.NamedTuple):
    """Holds a compiled kernel. `memory`: how often each instruction that reads or writes memory
    stands in the code.
    """

    name: str
    target: str
    registers: int
    # bytes of stack and local memory; scalar registers that lie in vector registers do not count
    spilled: int
    # bytes
    shared: int
    memory: dict[str, int]

    def count(self, pattern: str) -> int:
        """Counts the memory instructions that fully match a regular expression."""
        return sum(number for name, number in self.memory.items() if re.fullmatch(pattern, name))

    @property
    def wide(self) -> tuple[int, int]:
        """Counts global loads and stores of 128 bits."""
        if self.target.startswith("sm"):
            return self.count(r"LDG\..*\b128\b.*"), self.count(r"STG\..*\b128\b.*")
        return self.count(r"(global|buffer)_load_(dwordx4|b128)"), self.count(
            r"(global|buffer)_store_(dwordx4|b128)"
        )


class Assembly(typing.NamedTuple):
    """Holds the code of a kernel: instructions, and labels with a colon; for NVIDIA's GPUs those of
    PTX, in the order of the program.
    """

    name: str
    registers: int
    warps: int
    lines: list[str]

    def loops(self) -> list[list[str]]:
        """Returns the instructions of the innermost loops, by the backward branches, for AMD."""
        labels = {line[:-1]: at for at, line in enumerate(self.lines) if line.endswith(":")}
        spans = []
        for at, line in enumerate(self.lines):
            target = re.match(r"s_c?branch\S*\s+(\.L\w+)", line)
            if target and labels[target[1]] < at:
                spans.append((labels[target[1]], at))
        return [
            [line for line in self.lines[a : b + 1] if not line.endswith(":")]
            for a, b in spans
            if not any(a <= c and d <= b for c, d in spans if (a, b) != (c, d))
        ]


def why_not(version: str) -> str | None:
    """Tells why a version of Triton cannot compile here, and what to do; None where it can."""
    folder = VERSIONS[version]
    if folder is None or folder.exists():
        return None
    return f"Triton {version} is not in {folder}; `make {folder.relative_to(ROOT)}` puts it there"


@functools.cache
def assembly(statement: str, target: str) -> list[Assembly]:
    """Compiles what a statement launches, in the order of the launches."""
    (line,) = compiled((statement,), target, code="text")
    assert "error" not in line, f"{statement} for {target}: {line['error']}"
    return [Assembly(*fields) for fields in line["kernels"]]


@functools.cache
def kernels(*statements: str) -> dict[tuple[str, str], list[Kernel]]:
    """Compiles what each statement launches, by (statement, target). `import torch` and `import
    uegr_kernels as uk` are done already.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda target: compiled(statements, target, code="memory"), TARGETS))
    found: dict[tuple[str, str], list[Kernel]] = {
        (statement, target): [] for statement in statements for target in TARGETS
    }
    for target, lines in zip(TARGETS, parts, strict=True):
        for line in lines:
            assert "error" not in line, f"{line['statement']} for {target}: {line['error']}"
            found[line["statement"], target] = [Kernel(*fields) for fields in line["kernels"]]
    return found


@functools.cache
def usage(*statements: str) -> dict[tuple[str, str], list[dict[str, typing.Any]]]:
    """Compiles, by (version, target), what each statement launches, or says why it cannot be;
    without the kernels' instructions.
    """
    every = [(name, target) for name in VERSIONS if why_not(name) is None for target in TARGETS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(
            zip(
                every,
                pool.map(lambda one: compiled(statements, one[1], one[0]), every),
                strict=True,
            )
        )


def compiled(
    statements: tuple[str, ...], target: str, version: str = "installed", *, code: str = ""
) -> list[dict[str, typing.Any]]:
    """Compiles what each statement launches for one target with one version of Triton, and returns
    a line a statement: the kernels' fields, or the error.

    code  "": the kernels without their instructions; "memory": with those that read or write
        memory; "text": the fields of Assembly instead
    """
    # the installed one would take its place unseen
    reason = why_not(version)
    assert reason is None, reason
    folder = VERSIONS[version]
    paths = [str(folder)] * (folder is not None) + [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    # what Triton 3.10 does unless a launch asks for it
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    command = [sys.executable, "-m", "bench.triton_code"]
    run = subprocess.run(
        command,
        input=json.dumps([statements, target, code]),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    import uegr_kernels as uk
    from uegr_kernels.core import backends

    class Absent:
        """Stands for the driver of a GPU that is not here: enough of it to compile for it."""

        def __init__(self, name: str):
            lanes = 64 if name.startswith("gfx9") else 32
            self.name, self.target = (
                name,
                GPUTarget(
                    *(("cuda", int(name[3:])) if name.startswith("sm_") else ("hip", name)), lanes
                ),
            )

        def get_current_target(self):
            return self.target

        def get_current_device(self):
            return self.name

        def get_current_stream(self, device):
            return 0

    launch = triton.JITFunction.run
    seen = []

    def compile_alone(self, *args, grid, warmup, **options):
        seen.append(launch(self, *args, grid=grid, warmup=True, **options))
        return seen[-1]

    triton.JITFunction.run = compile_alone
    backends.choose = lambda *arguments: "triton"
    statements, target, code = json.load(sys.stdin)
    driver.set_active(Absent(target))
    torch.version.hip = "absent" if target.startswith("gfx") else None
    looked_at = functools.cache(
        lambda kernel: (
            text_of(kernel, target)
            if code == "text"
            else [kernel.name, target, *resources(kernel, target, code == "memory")]
        )
    )
    for statement in statements:
        seen.clear()
        line = {"statement": statement}
        try:
            exec(statement, {"torch": torch, "uk": uk})
            line["kernels"] = [looked_at(kernel) for kernel in dict.fromkeys(seen)]
        except Exception as error:
            # a compiler's may be any
            while error.__cause__ is not None:
                error = error.__cause__
            line["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(line), flush=True)


def text_of(kernel, target: str) -> list[typing.Any]:
    """Returns the fields of Assembly."""
    if target.startswith("sm"):
        pattern = r"^(?:(\$L\w+:)|\s+(?:@!?%p\d+ +)?([a-z]\w*\.[^;]*))"
        lines = re.findall(pattern, kernel.asm["ptx"], re.MULTILINE)
    else:
        pattern = r"^(?:(\.L\w+:)|\s+((?:[vs]|global|buffer|flat|scratch|ds)_.*\S))"
        lines = re.findall(pattern, kernel.asm["amdgcn"], re.MULTILINE)
    registers, *_ = resources(kernel, target, False)
    return [kernel.name, registers, kernel.metadata.num_warps, [a or b for a, b in lines]]


def resources(kernel, target: str, code: bool) -> tuple[int, int, int, dict[str, int]]:
    """Returns registers, spilled, shared memory, and with `code` the memory instructions."""
    assert kernel.metadata.enable_fp_fusion, "take the launch's options from compile_options"
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.vgpr_{name}: *(\d+)", text)[1]) for name in ("count", "spill_count")
        )
        scratch = int(re.search(r"ScratchSize: (\d+)", text)[1])
        memory = (
            re.findall(r"^\s+((?:global|buffer|flat|scratch|ds)_\w+)", text, re.MULTILINE)
            if code
            else ()
        )
        return (
            registers,
            max(scratch, 4 * spilled),
            kernel.metadata.shared,
            collections.Counter(memory),
        )
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([cuobjdump, "-res-usage", file.name], text=True)
        text = subprocess.check_output([cuobjdump, "-sass", file.name], text=True) if code else ""
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    memory = re.findall(
        r"\b((?:LDG|STG|LDL|STL|LDS|STS|ATOM|ATOMG|ATOMS|RED|REDG|LD|ST)\.?[\w.]*)", text
    )
    return registers, stack + local, kernel.metadata.shared, collections.Counter(memory)


if __name__ == "__main__":
    main()
