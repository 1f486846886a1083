"""Lays out a repository of the Hugging Face Kernel Hub: `build_hub.py FOLDER`, from the sources'
root, after `make build`; `make hub` calls it.

FOLDER/build has a variant for every device, with Triton's kernels and the reference, and one with
the compiled libraries for the CPU. Each is the package under a name of its own, made from what is
in it, which is also the namespace of its operators: several versions, and the installed package,
go into one process. What is published is built where glibc is 2.28, as the Hub asks.
"""

import base64
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE, NAME, LICENSE = Path("uegr_kernels"), "uegr-kernels", "Apache-2.0"
# A kernel imports torch, the standard library and itself alone; what trains by a command, or
# inside a framework, is the installed package's.
LEFT_OUT = ("__main__.py", "finetune", "integrations", "_lib")
# For versions of `kernels` that look for a folder of the package's name.
FORWARD = '''"""The kernel in the folder above, for older versions of `kernels`."""

import importlib.util
import pathlib
import sys

if "{name}" not in sys.modules:
    file = pathlib.Path(__file__).parent.parent / "__init__.py"
    spec = importlib.util.spec_from_file_location("{name}", file)
    sys.modules["{name}"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
globals().update(vars(sys.modules["{name}"]))
'''


def package_files() -> list[Path]:
    return [
        file
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in LEFT_OUT
    ]


def digest() -> str:
    """Returns what tells this state of the sources from any other."""
    sources = [file for file in sorted(Path("csrc").rglob("*")) if file.is_file()]
    found = hashlib.sha256()
    for file in (*package_files(), *sources, Path("setup.py")):
        if "__pycache__" not in file.parts:
            found.update(f"{file.as_posix()}\0".encode() + file.read_bytes())
    return found.hexdigest()[:10]


def stable_abi() -> str:
    """Returns the oldest torch that the libraries run with, in the words of a variant: "211"."""
    known = re.search(r"TORCH_TARGET_VERSION=0x(..)(..)", Path("setup.py").read_text())
    if known is None:
        raise SystemExit("setup.py names no TORCH_TARGET_VERSION")
    return f"{int(known[1], 16)}{int(known[2], 16)}"


def link(library: Path, namespace: str, folder: Path) -> None:
    """Links a library of `make build` once more, with its operators in another namespace, which
    only csrc/library.cpp knows.
    """
    ninja = [sys.executable, "-m", "ninja", "-f", "build/inplace/build.ninja"]
    commands = subprocess.check_output([*ninja, "-t", "commands", library], text=True).splitlines()
    entry = next(command for command in commands if " -c csrc/library.cpp " in command)
    old, new = entry.rpartition(" -o ")[2], folder / f"{library.stem}.o"
    for command in (f"{entry} -DUEGR_NAMESPACE={namespace}", commands[-1]):
        ours = command.replace(old, str(new)).replace(str(library), str(folder / library.name))
        subprocess.run(ours, shell=True, check=True)
    for left in (new, Path(f"{new}.d")):
        left.unlink()


def lay_out(variant: Path, name: str, backend: str, libraries: list[Path]) -> None:
    """Writes a variant: the package, its libraries and its metadata."""
    shutil.rmtree(variant, ignore_errors=True)
    for file in package_files():
        target = variant / file.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (variant / PACKAGE).mkdir()
    (variant / PACKAGE / "__init__.py").write_text(FORWARD.format(name=name))
    (variant / "_lib").mkdir()
    for library in libraries:
        link(library, name, (variant / "_lib").resolve())
    if not libraries:
        reason = "this variant of the kernel has none (take the sources of uegr-kernels instead)"
        (variant / "_lib/not_built.txt").write_text(f"{reason}\n")
    files = {
        file.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(file.read_bytes()).digest()
        ).decode()
        for file in sorted(variant.rglob("*"))
        if file.is_file()
    }
    version = re.search(r'__version__ = "(\d+)', (PACKAGE / "__init__.py").read_text())
    metadata = {
        "name": NAME,
        "id": name,
        "version": int(version[1]) if version else 0,  # the Hub's, of the API; 0: may still change
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(f"{json.dumps(metadata, indent=2)}\n")


def main(folder: Path) -> None:
    libraries = sorted((PACKAGE / "_lib").glob("uegr_kernels_*.so"))
    libraries = [library for library in libraries if library.stem != "uegr_kernels_cuda"]
    if not libraries:
        raise SystemExit("the libraries are not built; run `make build`")
    state = digest()
    system = f"{platform.machine()}-{platform.system().lower()}"
    shutil.rmtree(folder, ignore_errors=True)
    # The Hub knows no word for all devices beside the variant's own; Triton's are CUDA's.
    for variant, kind, backend, linked in (
        ("torch-universal", "universal", "cuda", []),
        (f"torch-stable-abi{stable_abi()}-cpu-{system}", "cpu", "cpu", libraries),
    ):
        lay_out(folder / "build" / variant, f"_uegr_kernels_{kind}_{state}", backend, linked)
        print(f"uegr-kernels: {folder / 'build' / variant}")
    shutil.copyfile("LICENSE", folder / "LICENSE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
