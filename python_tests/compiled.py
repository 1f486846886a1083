"""Triton kernels compiled ahead of time for GPUs that are not here, and what the compilers made of them.

Statements run as they stand, on small CPU tensors, with the Triton backend chosen; a launch compiles its kernel for a target in the place
of running it. All of it happens in one process of its own, since this one may have decorated its kernels for the interpreter.
"""

import collections
import concurrent.futures
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import typing

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Kernel(typing.NamedTuple):
    """A compiled kernel. `memory`: how often each instruction that reads or writes memory stands in the code."""

    name: str
    target: str
    registers: int
    spilled: int  # registers, or bytes of stack and local memory
    shared: int  # bytes
    memory: dict[str, int]

    def count(self, pattern: str) -> int:
        """How many memory instructions fully match a regular expression."""
        return sum(number for name, number in self.memory.items() if re.fullmatch(pattern, name))

    @property
    def wide(self) -> tuple[int, int]:
        """Global loads and stores of 128 bits."""
        if self.target.startswith("sm"):
            return self.count(r"LDG\..*\b128\b.*"), self.count(r"STG\..*\b128\b.*")
        return self.count(r"(global|buffer)_load_dwordx4"), self.count(r"(global|buffer)_store_dwordx4")


@functools.cache
def kernels(*statements: str) -> dict[tuple[str, str], list[Kernel]]:
    """What each statement launches, by (statement, target). `import torch` and `import uegr_kernels as uk` are done already."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a process for half of the targets each
        halves = list(pool.map(lambda targets: _compiled(statements, targets), (TARGETS[::2], TARGETS[1::2])))
    found: dict[tuple[str, str], list[Kernel]] = {(statement, target): [] for statement in statements for target in TARGETS}
    for statement, *fields in itertools.chain(*halves):
        found[statement, fields[1]].append(Kernel(*fields))
    return found


def _compiled(statements: tuple[str, ...], targets: tuple[str, ...]) -> list[list]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    run = subprocess.run(command, input=json.dumps([statements, targets]), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    import uegr_kernels as uk
    from uegr_kernels.core import backends

    class Absent:
        """A driver for a GPU that is not here: enough of one to compile for it."""

        def __init__(self, name: str):
            cuda = name.startswith("sm_")
            self.name, self.target = name, GPUTarget(*(("cuda", int(name[3:]), 32) if cuda else ("hip", name, 64)))

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
    statements, targets = json.load(sys.stdin)
    found = []
    for statement in statements:
        for target in targets:
            driver.set_active(Absent(target))
            torch.version.hip = "absent" if target.startswith("gfx") else None
            seen.clear()
            exec(statement, {"torch": torch, "uk": uk})
            found += [[statement, kernel.name, target, *resources(kernel, target)] for kernel in dict.fromkeys(seen)]
    print(json.dumps(found))


def resources(kernel, target: str) -> tuple[int, int, int, dict[str, int]]:
    """Registers, spilled, shared memory, memory instructions."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        spills = re.findall(r"\.(?:v|s)gpr_spill_count: (\d+)|ScratchSize: (\d+)", text)
        assert len(spills) == 3, "the compiler's remarks have changed"
        registers = int(re.search(r"\.vgpr_count: *(\d+)", text)[1])
        memory = re.findall(r"^\s+((?:global|buffer|flat|scratch|ds)_\w+)", text, re.MULTILINE)
        return registers, sum(int(a or b) for a, b in spills), kernel.metadata.shared, collections.Counter(memory)
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (subprocess.check_output([cuobjdump, option, file.name], text=True) for option in ("-res-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    memory = re.findall(r"\b((?:LDG|STG|LDL|STL|LDS|STS|ATOM|ATOMG|ATOMS|RED|REDG|LD|ST)\.?[\w.]*)", code)
    return registers, stack + local, kernel.metadata.shared, collections.Counter(memory)


if __name__ == "__main__":
    main()
