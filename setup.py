"""Builds the native libraries where a compiler and torch's headers are found;
UEGR_KERNELS_BUILD=0 forbids it, =1 insists on it.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shlex import quote, split
from sysconfig import get_config_var, get_default_scheme, get_path, get_platform, get_scheme_names

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -Wall -Wextra -Werror -Icsrc"
)
# 2.11, the oldest torch that pyproject.toml allows
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# what torch compiles its own AVX2 kernels with: core/native.py goes by its word
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
ISAS = (
    {"baseline": "", "avx2": AVX2, "avx512": AVX512}
    if get_platform().endswith("x86_64")
    else {"baseline": ""}
)


def find_torch() -> Path:
    # pip's isolation takes the environment's packages off sys.path; sysconfig still knows where
    # they lie, also below a venv.
    schemes = [
        (s, base)
        for base in (sys.prefix, sys.base_prefix)
        for s in (get_default_scheme(), *get_scheme_names())
    ]
    known = [
        get_path(kind, s, {"base": base, "platbase": base})
        for s, base in schemes
        for kind in ("purelib", "platlib")
    ]
    named = os.environ.get("UEGR_KERNELS_TORCH")
    for torch in (
        [Path(named)] if named else [Path(place, "torch") for place in (*sys.path, *known)]
    ):
        found = (file := torch / "version.py").is_file() and re.search(
            r"__version__ = '(\d+)\.(\d+)", file.read_text()
        )
        if (
            found
            and (int(found[1]), int(found[2])) >= (2, 11)
            and (torch / "include/torch/csrc/stable").is_dir()
        ):
            return torch
    raise CompileError(
        f"no torch 2.11 or newer in {named or known[0]} (install torch, or name its "
        "folder by UEGR_KERNELS_TORCH; `python -m build` sees it with --no-isolation alone)"
    )


def ninja_lines(compiler: str, folder: Path, libraries: list[tuple[Path, list[Path], str, str]]):
    """Yields Ninja's text for libraries given as (file, sources, flags of the compiler, flags of
    the linker).
    """
    yield (
        f"builddir = {folder}\ncxx = {compiler}\nmore = {os.environ.get('CXXFLAGS', '')}\nrule "
        "compile\n  depfile = $out.d\n  deps = gcc"
    )
    yield (
        "  command = $cxx $flags $more -MD -MF $out.d -c $in -o $out\nrule link\n  command = "
        "$cxx -shared $in -o $out $flags $more"
    )
    for library, sources, compile_flags, link_flags in libraries:
        objects = [folder / library.name / f"{source}.o" for source in sources]
        for target, source in zip(objects, sources, strict=True):
            yield f"build {target}: compile {source}\n  flags = {compile_flags.replace('$', '$$')}"
        yield (
            f"build {library}: link {' '.join(map(str, objects))}\n  flags = "
            f"{link_flags.replace('$', '$$')}\n"
        )


# every CompileError says why there is no native code, and in brackets what would change that
class BuildNative(build_ext):
    def run(self) -> None:
        note = Path("" if self.inplace else self.build_lib, "uegr_kernels/_lib/not_built.txt")
        try:
            self.build(note.parent.parent)
            note.unlink(missing_ok=True)
        except CompileError as reason:
            # what an earlier build left would pass for this one's
            shutil.rmtree(note.parent, ignore_errors=True)
            note.parent.mkdir(parents=True)
            note.write_text(f"{reason}\n")
            print(f"uegr-kernels: native code is not built: {reason}", flush=True)
            if os.environ.get("UEGR_KERNELS_BUILD") == "1":
                raise

    def build(self, package: Path) -> None:
        if os.environ.get("UEGR_KERNELS_BUILD") == "0":
            raise CompileError("UEGR_KERNELS_BUILD=0 forbade it (unset it)")
        compiler = os.environ.get("CXX") or next(
            filter(shutil.which, ("c++", "g++", "clang++")), "c++"
        )
        if not shutil.which(split(compiler)[0]):
            raise CompileError(
                f"the C++ compiler {compiler} was not found (install g++, or name another in CXX)"
            )
        # editable: outlives its own build_temp
        torch, folder = find_torch(), Path("build/inplace" if self.inplace else self.build_temp)
        sources = [Path("csrc/library.cpp"), *sorted(Path("csrc").glob("*/*_cpu.cpp"))]
        flags = f"{FLAGS} {ABI} -isystem {quote(f'{torch}/include')}"
        link = f"-Wl,-z,defs -Wl,--no-as-needed -L{quote(f'{torch}/lib')} -ltorch_cpu"
        libraries = [
            (package / f"_lib/uegr_kernels_{isa}.so", sources, f"{flags} {ISAS[isa]}", link)
            for isa in ISAS
        ]
        # for tests: never in a wheel
        if (
            self.inplace
            and Path("csrc/bindings.cpp").exists()
            and (pybind11 := find_spec("pybind11"))
        ):
            includes = (
                f"-isystem {quote(f'{Path(pybind11.origin).parent}/include')} -isystem "
                f"{quote(get_path('include'))}"
            )
            libraries.append(
                (
                    package / f"_bindings{get_config_var('EXT_SUFFIX')}",
                    [Path("csrc/bindings.cpp")],
                    f"{FLAGS} {includes}",
                    "",
                )
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(ninja_lines(compiler, folder, libraries)))
        print(
            f"uegr-kernels: building for {', '.join(ISAS)} with {compiler} and the headers of "
            f"{torch}",
            flush=True,
        )
        ninja = [
            sys.executable,
            "-m",
            "ninja",
            "-f",
            str(folder / "build.ninja"),
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
            error = re.search(
                r".*(error: |undefined reference|No module "
                r"named).*",
                run.stdout,
            ) or [run.stdout[-200:]]
            raise CompileError(
                f"the compile failed with: {error[0].strip()} (`pip install -v` shows the rest)"
            )
        cuda = [
            sys.executable,
            "csrc/build_cuda.py",
            str(torch),
            str(folder / "cuda"),
            str(package / "_lib"),
        ]
        if (
            Path(cuda[1]).exists()
            and subprocess.run(cuda).returncode
            and os.environ.get("UEGR_KERNELS_BUILD") == "1"
        ):
            raise CompileError(
                "the CUDA library was insisted on and failed (see above; "
                "UEGR_KERNELS_CUDA=0 leaves it out)"
            )

    # asked by `pip install -e . --config-settings editable_mode=strict`
    def get_output_mapping(self) -> dict[str, str]:
        built = (
            file
            for pattern in ("_lib/*", "_bindings.*")
            for file in Path("uegr_kernels").glob(pattern)
            if self.inplace
        )
        return {str(Path(self.build_lib, file)): str(file) for file in built}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # without a library a wheel serves every platform
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("*.so"))
        # the libraries hold no Python symbol
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("uegr_kernels._lib", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
