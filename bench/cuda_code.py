"""What compilers make of the CUDA sources: registers, spills, and the instructions of loops, read
from the disassembly. The tests hold it to bounds, the model of the kernels is made of it.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import torch

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = {path.parent.name: path for path in sorted((ROOT / "csrc").glob("*/*_cuda.cu"))}
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
TORCH = pathlib.Path(torch.__file__).parent
DEFINITIONS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
INCLUDES = ("-Icsrc", "-isystem", f"{TORCH}/include")
HEADERS = sorted(path for ending in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{ending}"))
WORKERS = concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def run(*command, **options) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=500, **options
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
    return done.stdout + done.stderr


@dataclasses.dataclass
class Kernel:
    name: str
    registers: int
    # bytes
    stack: int
    spilled: int
    # address, text
    instructions: list[tuple[int, str]]

    def spans(self) -> list[tuple[int, int]]:
        """Returns the loops' first and last addresses, by their backward branches."""
        spans = []
        for address, text in self.instructions:
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                spans.append((int(target[1], 16), address))
        return spans

    def body(self, span: tuple[int, int]) -> list[str]:
        return [text for address, text in self.instructions if span[0] <= address <= span[1]]

    def innermost(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [
            (a, b)
            for a, b in spans
            if not any(a <= c and d <= b for c, d in spans if (a, b) != (c, d))
        ]

    def loops(self) -> list[list[str]]:
        """Returns the innermost loops."""
        return [self.body(span) for span in self.innermost(self.spans())]

    def element_loops(self) -> list[list[str]]:
        """Returns those that elements pass through: the innermost ones with whole accesses."""
        spans = [
            span
            for span in self.spans()
            if any(is_whole(text) for text in self.body(span) if is_global(text))
        ]
        return [self.body(span) for span in self.innermost(spans)]

    def run_through(self, loop: list[str], turns: int) -> list[str]:
        """Returns what a thread issues in a round of a loop, one inside of which takes turns."""
        inside = [inner for inner in self.loops() if len(inner) < len(loop) and inner[0] in loop]
        inside = [inner for inner in inside if "".join(inner) in "".join(loop)]
        assert len(inside) == (turns > 1)
        return loop + (turns - 1) * (inside[0] if inside else [])


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def is_global(text: str) -> bool:
    return re.match(r"LDG|STG|LD\.|ST\.", opcode(text)) is not None


def is_whole(text: str) -> bool:
    return ".128" in opcode(text)


def count(loop: list[str], pattern: str) -> int:
    return sum(re.match(pattern, opcode(text)) is not None for text in loop)


def asked_ahead(loop: list[str]) -> int:
    """Counts the whole loads ahead of the first instruction that waits for one of them."""
    loaded: set[int] = set()
    for text in loop:
        operands = text.split(opcode(text), 1)[1]
        found = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        writes = re.match(r"ST|RED|BRA|BAR|ISETP|FSETP|@", opcode(text)) is None
        if loaded & set(found[1 if writes and found else 0 :]):
            break
        if re.match(r"LDG.*\.128", opcode(text)):
            loaded |= set(range(found[0], found[0] + 4))
    return len(loaded) // 4


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    bundled = pathlib.Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return found or (str(bundled) if bundled and bundled.exists() else None)


def short(mangled: str) -> str:
    """Returns the function's own name and its template's arguments: step_fullILb0ELb0E..."""
    rest = re.sub(r"^_ZN4uegr(\d+)", lambda m: f"{m[1]}|", mangled).split("|", 1)
    if len(rest) == 2:
        rest = [rest[1][int(rest[0]) :]]
    return re.sub(r"^\d+", "", rest[-1])


def kept(name: str, command: list, sources: list[pathlib.Path], make) -> pathlib.Path:
    """Returns build/cuda_tests/NAME_HASH/, filled by make(folder) unless it was made of the same
    command and contents before.
    """
    digest = hashlib.sha256(repr((list(map(str, command)), torch.__version__)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build/cuda_tests" / f"{name}_{digest.hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # another process may have filled it by now
        for old in {*folder.parent.glob(f"{name}_*")} - {folder}:
            shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as fresh:
            make(pathlib.Path(fresh))
            try:
                os.rename(fresh, folder)
            except OSError:
                # another process was faster
                if not folder.exists():
                    raise
    return folder


def compile_one(path: pathlib.Path, arch: str) -> pathlib.Path:
    """Returns a folder with the compiler's report and the disassembly."""
    flags = [
        "-std=c++17",
        "-O3",
        "-cubin",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall,-Wextra",
        "-Xptxas",
        "-v",
        f"-arch={arch}",
    ]
    command = ["nvcc", *flags, *DEFINITIONS, *INCLUDES, path]

    def make(folder: pathlib.Path) -> None:
        (folder / "report.txt").write_text(run(*command, "-o", folder / "cubin"))
        (folder / "sass.txt").write_text(
            run(cuobjdump(), "-sass", folder / "cubin") if cuobjdump() else ""
        )

    return kept(
        f"{path.stem}_{arch}", [*command, nvcc_version(), cuobjdump()], [*HEADERS, path], make
    )


@functools.cache
def nvcc_version() -> str:
    return run("nvcc", "--version")


@functools.cache
def compile_all() -> dict:
    """Returns (operator, architecture) -> the compile, running; the longest first."""
    jobs = sorted(
        ((path, arch) for path in SOURCES.values() for arch in ARCHITECTURES),
        key=lambda job: -job[0].stat().st_size,
    )
    return {
        (path.parent.name, arch): WORKERS.submit(compile_one, path, arch) for path, arch in jobs
    }


@functools.cache
def kernels(operator: str, arch: str) -> dict[str, Kernel]:
    folder = compile_all()[operator, arch].result()
    report = (folder / "report.txt").read_text()
    entries = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
        r"stores.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    listing = (folder / "sass.txt").read_text()
    code = {}
    for part in listing.split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.MULTILINE)
        code[name.strip()] = [(int(address, 16), line.strip()) for address, line in lines]
    return {
        short(name): Kernel(short(name), int(registers), int(stack), int(spilled), code[name])
        for name, stack, spilled, registers in entries
    }
