"""Builds the CUDA library: `build_cuda.py TORCH OBJECTS LIBRARIES`, three folders, from the
sources' root; setup.py calls it.

UEGR_KERNELS_CUDA=1 asks for it, 0 forbids it; without a word it is built where nvcc is found and
torch is a CUDA build. TORCH_CUDA_ARCH_LIST names the architectures. What fails leaves
cuda_not_built.txt with the reason, and exit status 1.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import quote

# a host does not know nvcc's `unroll`
WARNINGS = "-Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas -Werror all-warnings"
FLAGS = f"-x cu -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {WARNINGS} -Icsrc -DUSE_CUDA"
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in setup.py
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def architectures(names: str) -> list[str]:
    """Returns nvcc's words for what TORCH_CUDA_ARCH_LIST holds: numbers as in "8.0;9.0a+PTX"."""
    words = []
    for name in re.split("[; ]+", names.strip("; ")):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if not found:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST has {name!r} (give numbers, as in '8.0;9.0a+PTX')"
            )
        number = found[1] + found[2]
        words += [
            f"-gencode arch=compute_{number},code={kind}_{number}"
            for kind in ("sm", *(["compute"] if found[3] else []))
        ]
    return words


def ninja_text(torch: Path, objects: Path, library: Path, nvcc: str, names: str) -> str:
    # core/probe.cuh hands them out
    words = [*architectures(names), f"-DARCHITECTURES={'/'.join(re.findall('[^; ]+', names))}"]
    sources = [Path("csrc/library_cuda.cpp"), *sorted(Path("csrc").glob("*/*_cuda.cu"))]
    built = {objects / f"{source}.o": source for source in sources}
    # libtorch.so brings libtorch_cuda.so, which a machine that builds need not have.
    return "\n".join(
        (
            f"flags = {FLAGS} {ABI} {' '.join(words)} -isystem {quote(f'{torch}/include')}",
            f"link = -cudart static -Xlinker --no-as-needed -L{quote(f'{torch}/lib')} -ltorch "
            "-ltorch_cpu",
            f"rule compile\n  command = {quote(nvcc)} $flags -MD -MF $out.d -c $in -o $out\n  "
            "depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {quote(nvcc)} -shared $in -o $out $link",
            *(f"build {out}: compile {source}" for out, source in built.items()),
            f"build {library}: link {' '.join(map(str, built))}\n",
        )
    )


def build(torch: Path, objects: Path, library: Path) -> None:
    """Raises RuntimeError or ValueError with the reason, and in brackets what would change that."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise RuntimeError("nvcc was not found (install the CUDA toolkit, version 12.8 or newer)")
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    print(
        f"uegr-kernels: building for CUDA with {nvcc}: {' '.join(architectures(names))}", flush=True
    )
    objects.mkdir(parents=True, exist_ok=True)
    (objects / "build.ninja").write_text(ninja_text(torch, objects, library, nvcc, names))
    # as setup.py does, which imports nothing of the tree
    ninja = [
        sys.executable,
        "-m",
        "ninja",
        "-f",
        str(objects / "build.ninja"),
        f"-j{os.environ.get('MAX_JOBS') or os.cpu_count()}",
    ]
    run = subprocess.run(
        ninja,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    if run.returncode:
        print(run.stdout, flush=True)
        error = re.search(r".*(error|fatal).*", run.stdout) or [run.stdout[-200:]]
        raise RuntimeError(
            f"the compile failed with: {error[0].strip()} (`pip install -v` shows the rest)"
        )


def main(torch: Path, objects: Path, libraries: Path) -> int:
    library, note = libraries / "uegr_kernels_cuda.so", libraries / "cuda_not_built.txt"
    note.unlink(missing_ok=True)
    has_cuda = re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE)
    wish = os.environ.get("UEGR_KERNELS_CUDA") or (
        "1" if has_cuda and shutil.which("nvcc") else "0"
    )
    if wish == "0":
        library.unlink(missing_ok=True)
        return 0
    try:
        build(torch, objects, library)
    except (RuntimeError, ValueError) as reason:
        library.unlink(missing_ok=True)
        note.write_text(f"{reason}\n")
        print(f"uegr-kernels: the CUDA library is not built: {reason}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
