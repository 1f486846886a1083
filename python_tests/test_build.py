"""The build and what is done without it: which library is loaded, what it asks of torch, and
what setup.py leaves where it cannot build.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import operator_tests

import uegr_kernels
from uegr_kernels import __main__ as program
from uegr_kernels.core import backends, native

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(uegr_kernels.__file__).parent
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, **options
    )


# ---- The library that is loaded


@pytest.fixture
def library() -> pathlib.Path:
    isa, reason = native.load()
    if reason:
        pytest.skip(reason)
    return native.LIBRARIES / f"uegr_kernels_{isa}.so"


def test_exactly_one_library_is_loaded(library):
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list what is loaded")
    assert set(re.findall(r"\S*uegr_kernels_(?:baseline|avx2|avx512)\.so", maps.read_text())) == {
        str(library)
    }


@pytest.mark.parametrize("isa", native.ISAS[:-1])
def test_environment_chooses_the_instruction_set(isa):
    if isa not in native.supported_isas() or isa not in native.built_isas():
        pytest.skip(f"no {isa} library that this processor runs")
    done = run(
        "-c",
        "from uegr_kernels.core import native; print(native.load())",
        env={**os.environ, "UEGR_KERNELS_ISA": isa},
    )
    assert done.stdout.strip() == f"('{isa}', None)", done.stderr


SYSTEM = r"libc|libm|libstdc\+\+|libgcc_s|ld-linux[\w-]*"


def symbols(file: pathlib.Path) -> list[tuple[str, str]]:
    """Gives what a library asks others for: the symbol, and the version of the system library it is
    from, or "".
    """
    text = subprocess.run(["nm", "-D", file], capture_output=True, text=True, check=True).stdout
    return re.findall(r" U ([^\s@]+)@*(\S*)", text)


def needed(file: pathlib.Path) -> list[str]:
    text = subprocess.run(
        ["readelf", "-d", file], capture_output=True, text=True, check=True
    ).stdout
    assert "RPATH" not in text and "RUNPATH" not in text, "the path of the machine that built it"
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)


def test_libraries_ask_for_torchs_c_functions_and_the_system_only(library):
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("nm or readelf is not installed")
    for isa in native.built_isas():
        file = library.with_name(f"uegr_kernels_{isa}.so")
        asked = symbols(file)
        others = [
            name
            for name, version in asked
            if not re.match(r"(GLIBC|GLIBCXX|CXXABI|GCC)_\d", version)
        ]
        assert any(name.startswith("aoti_torch_") for name in others), (
            f"{file.name} does not use the stable ABI"
        )
        strange = [name for name in others if not re.match(r"(aoti_)?torch_\w+$", name)]
        assert not strange, (
            f"{file.name} needs more than torch's C functions, which alone stay as they are: "
            f"{strange}"
        )
        libraries = needed(file)
        assert "libtorch_cpu.so" in libraries
        assert [
            name
            for name in libraries
            if not re.match(rf"(libtorch|libtorch_cpu|{SYSTEM})\.so", name)
        ] == []


def test_an_audit_finds_the_libraries_stable_from_the_oldest_torch_on(library):
    if not importlib.util.find_spec("torch_abi_audit"):
        pytest.skip("torch-abi-audit is not installed")
    for isa in native.built_isas():
        file = library.with_name(f"uegr_kernels_{isa}.so")
        done = run(
            "-c", "from torch_abi_audit.cli import main; main()", "--check", "torch", "--json", file
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = json.loads(done.stdout)["bundled_libs"]
        assert found["torch"]["stable"] and not found["torch"]["unstable_symbols"]
        oldest = re.search(r"torch>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
        assert found["torch"]["min_torch_version"].startswith(oldest)


# ---- No library, a wrong one, a wrong wish


@pytest.fixture
def no_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    monkeypatch.delenv("UEGR_KERNELS_ISA", raising=False)
    return tmp_path


def test_unknown_instruction_set_is_an_error_that_names_the_known(monkeypatch):
    monkeypatch.setenv("UEGR_KERNELS_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"UEGR_KERNELS_ISA='avx1024' .*baseline, avx2, avx512"):
        native.load.__wrapped__()


def test_instruction_set_beyond_the_processor_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "supported_isas", lambda: ("baseline",))
    monkeypatch.setenv("UEGR_KERNELS_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"more than this processor has \(baseline\)"):
        native.load.__wrapped__()


def test_missing_library_gives_reason_and_remedy(no_libraries):
    isa, reason = native.load.__wrapped__()
    assert isa is None
    assert "does not exist" in reason and REINSTALL in reason
    (no_libraries / "not_built.txt").write_text("the cat sat on the compiler (lift the cat)\n")
    isa, reason = native.load.__wrapped__()
    assert (
        "was not built: the cat sat on the compiler (lift the cat);"
    ) in reason and REINSTALL in reason


def test_unbuilt_source_folder_says_that_it_is_one(tmp_path, monkeypatch):
    """Which `python -m` in a clone takes ahead of what was installed from it."""
    monkeypatch.setattr(native, "LIBRARIES", tmp_path / "uegr_kernels/_lib")
    monkeypatch.delenv("UEGR_KERNELS_ISA", raising=False)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    (tmp_path / "setup.py").touch()
    for reason in (native.load.__wrapped__()[1], native.why_not_cuda.__wrapped__()):
        assert f"from its source folder, {tmp_path}, where nothing is built" in reason
        assert "pip install -e ." in reason and "compiler" not in reason and "nvcc" not in reason
    native.LIBRARIES.mkdir(parents=True)
    assert "from its source folder" not in native.load.__wrapped__()[1]


def test_library_that_does_not_load_gives_reason_and_remedy(no_libraries):
    for isa in native.ISAS:
        (no_libraries / f"uegr_kernels_{isa}.so").write_text("no library")
    isa, reason = native.load.__wrapped__()
    assert isa is None
    assert "does not load into torch" in reason and REINSTALL in reason


# ---- python -m uegr_kernels


def test_info_names_versions_and_every_backend():
    text = program.info()
    for word in (uegr_kernels.__version__, sys.version.split()[0], "threads", *backends.BACKENDS):
        assert word in text
    assert re.search(r"^ *reference +usable on cpu", text, re.MULTILINE)


def test_no_command_prints_the_usage(capsys):
    assert program.main([]) == 0
    assert "info" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["inform"], ["info", "more"]], ids=["command", "argument"])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


# ---- setup.py, on a tree with a library of one function

needs_setuptools = pytest.mark.skipif(
    not importlib.util.find_spec("setuptools") or not importlib.util.find_spec("ninja"),
    reason="setuptools or ninja is not installed",
)


class Tree:
    """Makes a copy of what the build reads, around sources that compile in a moment."""

    def __init__(self, root: pathlib.Path):
        self.root, self.libraries = root, root / "uegr_kernels/_lib"
        for folder in ("uegr_kernels", "csrc/core", "csrc/selective"):
            (root / folder).mkdir(parents=True)
        for name in (
            "setup.py",
            "pyproject.toml",
            "MANIFEST.in",
            "LICENSE",
            "uegr_kernels/__init__.py",
        ):
            shutil.copy(ROOT / name, root / name)
        (root / "README.md").write_text("a tree for tests\n")
        (root / "csrc/core/number.h").write_text("constexpr int number = 1;\n")
        (root / "csrc/library.cpp").write_text(
            'int one();\nextern "C" __attribute__((visibility("default"))) int entry() { return '
            "one(); }\n"
        )
        (root / "csrc/selective/selective_cpu.cpp").write_text(
            '#include "core/number.h"\nint one() { return number; }\n'
        )
        (root / "csrc/bindings.cpp").write_text("int bindings = 1;\n")

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("UEGR_KERNELS_") and key not in ("CXX", "CXXFLAGS")
        }
        return run("setup.py", *arguments, cwd=self.root, env=inherited | environment)

    def built(self) -> set[str]:
        return {file.name for file in self.libraries.glob("*")}


def names_in(archive: pathlib.Path) -> list[str]:
    return zipfile.ZipFile(archive).namelist()


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


@needs_setuptools
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"CXX": "no-such-compiler"},
            "no-such-compiler was not found (install g++, or name another in CXX)",
        ),
        ({"UEGR_KERNELS_TORCH": "/no/such/torch"}, "no torch 2.11 or newer in /no/such/torch"),
        ({"UEGR_KERNELS_TORCH": "/no/such/torch"}, "`python -m build` sees it with --no-isolation"),
        ({"UEGR_KERNELS_BUILD": "0"}, "UEGR_KERNELS_BUILD=0 forbade it"),
    ],
    ids=["compiler", "torch", "isolation", "forbidden"],
)
def test_setup_succeeds_without_what_it_needs_and_leaves_the_reason(tree, environment, reason):
    tree.libraries.mkdir()
    (tree.libraries / "uegr_kernels_baseline.so").write_text("of an earlier build")
    done = tree.setup("build_ext", "--inplace", **environment)
    assert done.returncode == 0, done.stderr
    assert (
        len([line for line in done.stdout.splitlines() if line.startswith("uegr-kernels: ")]) == 1
    )
    assert reason in done.stdout
    assert tree.built() == {"not_built.txt"}
    assert reason in (tree.libraries / "not_built.txt").read_text()


@needs_setuptools
def test_setup_fails_where_native_code_is_insisted_on(tree):
    done = tree.setup("build_ext", "--inplace", UEGR_KERNELS_BUILD="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no-such-compiler was not found" in done.stderr


@needs_setuptools
def test_setup_builds_again_what_a_header_changed_and_says_which_line_is_wrong(tree):
    done = tree.setup("build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    if "not_built.txt" in tree.built():
        pytest.skip((tree.libraries / "not_built.txt").read_text())
    first = {name: (tree.libraries / name).stat().st_mtime_ns for name in tree.built()}
    assert "uegr_kernels_baseline.so" in first
    assert list(tree.libraries.parent.glob("_bindings*.so"))
    assert tree.setup("build_ext", "--inplace").returncode == 0
    assert {name: (tree.libraries / name).stat().st_mtime_ns for name in tree.built()} == first
    (tree.root / "csrc/core/number.h").write_text("constexpr int number = 2;\n")
    assert tree.setup("build_ext", "--inplace").returncode == 0
    assert all((tree.libraries / name).stat().st_mtime_ns > then for name, then in first.items())
    (tree.root / "csrc/core/number.h").write_text("constexpr int number = seven;\n")
    done = tree.setup("build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert tree.built() == {"not_built.txt"}
    assert re.search(
        r"number\.h:1:\d+: error: "
        r".*seven",
        (tree.libraries / "not_built.txt").read_text(),
    )


@needs_setuptools
def test_wheel_has_the_libraries_and_no_bindings(tree):
    (tree.root / "uegr_kernels/_bindings.so").write_text("of a development install\n")
    done = tree.setup("bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree.root / "dist").iterdir()
    built = "uegr_kernels_baseline.so" in {pathlib.Path(name).name for name in names_in(wheel)}
    assert f"-{uegr_kernels.__version__}-py3-none-" in wheel.name
    assert wheel.name.endswith("-any.whl") != built
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "_bindings" in name]
    assert [
        name
        for name in names
        if re.fullmatch(r"uegr_kernels/_lib/(uegr_kernels_baseline\.so|not_built\.txt)", name)
    ]


@needs_setuptools
def test_wheel_without_libraries_is_for_every_platform(tree):
    done = tree.setup("bdist_wheel", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree.root / "dist").iterdir()
    assert wheel.name == f"uegr_kernels-{uegr_kernels.__version__}-py3-none-any.whl"
    info = f"uegr_kernels-{uegr_kernels.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read(f"{info}/WHEEL").decode()
        reason = archive.read("uegr_kernels/_lib/not_built.txt").decode()
    assert "Root-Is-Purelib: true\n" in about and "Tag: py3-none-any\n" in about
    assert "no-such-compiler was not found" in reason


@needs_setuptools
def test_wheel_has_its_licence(tree):
    done = tree.setup("bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree.root / "dist").iterdir()
    info = f"uegr_kernels-{uegr_kernels.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert "License-Expression: Apache-2.0\n" in archive.read(f"{info}/METADATA").decode()
        assert "Version 2.0, January 2004" in archive.read(f"{info}/licenses/LICENSE").decode()


@needs_setuptools
def test_source_distribution_has_the_headers(tree):
    done = tree.setup("sdist", "--formats=zip")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree.root / "dist").iterdir()
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    assert {
        "setup.py",
        "LICENSE",
        "csrc/core/number.h",
        "csrc/library.cpp",
        "csrc/bindings.cpp",
    } <= names


# ---- Installed into an environment of its own, with the torch of another, and no network


PATHS = "import sysconfig; print(sysconfig.get_path('purelib'))"


class Environment:
    """Makes a virtual environment that may have a wheel, and on its path what another Python has
    installed.
    """

    def __init__(self, python: str, root: pathlib.Path, wheel: pathlib.Path | None = None):
        self.python, self.root = root / "bin/python", root
        subprocess.run([python, "-m", "venv", "--without-pip", root], check=True)
        if wheel is not None:
            self.install(wheel)
        own, others = (
            subprocess.check_output([which, "-c", PATHS], text=True).strip()
            for which in (self.python, python)
        )
        # a folder named so is searched last, and its .pth files are not read
        pathlib.Path(own, "others.pth").write_text(others)

    @staticmethod
    def environment() -> dict[str, str]:
        return {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "UEGR_KERNELS_ISA")
        }

    def install(self, wheel: pathlib.Path) -> None:
        pip = ["-m", "pip", "--python", self.python, "install", "-q", "--no-deps", "--no-index"]
        done = run(*pip, "--ignore-installed", wheel, env=self.environment(), cwd=self.root)
        assert done.returncode == 0, done.stderr

    def run(self, *command, **variables: str) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "timeout": 500, "cwd": self.root}
        environment = self.environment() | variables
        return subprocess.run([self.python, *map(str, command)], env=environment, **options)


def pythons() -> list[str]:
    """Gives this Python, and others that have a torch: python3.N on the path, and the ones that
    UEGR_KERNELS_TEST_PYTHONS names.
    """
    on_path = [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    return [
        sys.executable,
        *filter(None, on_path),
        *filter(None, os.environ.get("UEGR_KERNELS_TEST_PYTHONS", "").split(":")),
    ]


def torch_of(python: str) -> str | None:
    code = "import sys, torch; print(torch.__version__, sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Gives what `make wheel` makes, linked from what `make build` has compiled."""
    ninja = run("-m", "ninja", "-n", "-f", "build/inplace/build.ninja", cwd=ROOT)
    if "no work to do" not in ninja.stdout or native.why_not():
        pytest.skip("what build/inplace holds is not of these sources; run `make build`")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["build", "--build-temp", "build/inplace", "--build-lib", folder / "lib"]
    inplace = (ROOT / "build/inplace/build.ninja").read_text()
    done = run(
        "setup.py",
        "-q",
        *build,
        "bdist_wheel",
        "--bdist-dir",
        folder / "bdist",
        "--dist-dir",
        folder,
        cwd=ROOT,
    )
    (ROOT / "build/inplace/build.ninja").write_text(inplace)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@needs_setuptools
def test_wheel_holds_libraries_that_are_loaded_and_no_module(wheel):
    assert re.fullmatch(
        rf"uegr_kernels-{re.escape(uegr_kernels.__version__)}-py3-none-(linux|macosx|win)\w+\.whl",
        wheel.name,
    )
    names = set(zipfile.ZipFile(wheel).namelist())
    binaries = {
        name
        for name in names
        if not name.endswith((".py", ".typed", ".txt")) and ".dist-info/" not in name
    }
    assert binaries - {"uegr_kernels/_lib/uegr_kernels_cuda.so"} == {
        f"uegr_kernels/_lib/uegr_kernels_{isa}.so" for isa in native.built_isas()
    }
    assert {file.relative_to(ROOT).as_posix() for file in PACKAGE.rglob("*.py")} | {
        "uegr_kernels/py.typed"
    } <= names
    assert not [name for name in names if name.startswith(("python_tests", "bench", "csrc"))]


def check_wheel(
    wheel: pathlib.Path, python: str, root: pathlib.Path, operators: list[str], which: str
) -> None:
    """Installs the wheel and runs some of the operators' tests there."""
    there = Environment(python, root, wheel)
    shutil.copytree(
        ROOT / "python_tests",
        there.root / "python_tests",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    loaded = there.run(
        "-c",
        "import uegr_kernels as uk; from uegr_kernels.core import native; "
        "print(uk.__file__, native.load())",
    )
    assert str(there.root) in loaded.stdout and "None)" in loaded.stdout, (
        loaded.stdout + loaded.stderr
    )
    tests = [f"python_tests/{operator_tests(name)}" for name in operators]
    done = there.run("-m", "pytest", "-q", "-k", which, "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), (
        done.stdout[-3000:] + done.stderr[-3000:]
    )


@needs_setuptools
def test_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    check_wheel(
        wheel,
        sys.executable,
        tmp_path / "environment",
        ["perturbation", "dropout"],
        "cpp and bfloat16",
    )


@needs_setuptools
def test_wheel_works_with_another_torch_and_another_python(wheel, tmp_path):
    here = f"{torch.__version__} {sys.version_info[:2]}"
    others = {
        version: python for python in pythons() if (version := torch_of(python)) not in (None, here)
    }
    if not others:
        pytest.skip(
            f"torch and Python are {here}, and no others are here (UEGR_KERNELS_TEST_PYTHONS can "
            "name some)"
        )
    for version, python in others.items():
        operators = ["selective", "divergence", "perturbation", "dropout", "bistage"]
        check_wheel(wheel, python, tmp_path / version.split()[0], operators, "cpp")


WITHOUT_LIBRARY = """
import torch, uegr_kernels as uk
from uegr_kernels.__main__ import main
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
uk.SelectiveAdamW([p], seed=1).step()
assert (p < 1).all()
try:
    uk.SelectiveAdamW([p], seed=1, backend="cpp").step()
except RuntimeError as error:
    print(error)
main(["info"])
"""


NOT_SOURCES = ".*,build,dist,site,_lib,__pycache__,*.so,*.egg-info".split(",")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> pathlib.Path:
    """Gives what `python -m build` makes of the sources, unpacked."""
    if not importlib.util.find_spec("build"):
        pytest.skip("build is not installed")
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    shutil.copy(ROOT / ".clang-format", folder / "tree")
    done = run("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "tree")
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"uegr_kernels-{uegr_kernels.__version__}.tar.gz"
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_source_archive_holds_what_make_and_the_documents_name(sdist):
    named = re.findall(r"[\w./-]+\.txt|[\w/-]+\.py\b", (ROOT / "Makefile").read_text())
    assert {"requirements-dev.txt", "csrc/build_hub.py", "setup.py"} <= set(named)
    missing = [name for name in named if not (sdist / name).exists()]
    assert not missing, f"make names {missing}, which the source archive lacks"
    for page in (*sdist.glob("*.md"), *sdist.glob("docs/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            there = "://" in link or (page.parent / link).exists()
            assert there, f"{page.name} links to {link}, which the source archive lacks"


def test_source_archive_holds_the_files_that_git_does(sdist):
    """But for the numbers of results, and what serves the repository itself."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    left_out = re.compile(r"\.(ci|git)[^/]*(/|$)|bench/results/.*\.jsonl?$")
    missing = [
        name
        for name in listed.stdout.splitlines()
        if not left_out.match(name) and (ROOT / name).exists() and not (sdist / name).exists()
    ]
    assert not missing


def test_versions_agree():
    version = uegr_kernels.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[\d.]*)\]", changes, re.MULTILINE)
    assert released[0] == version, "the newest heading of CHANGELOG.md is another version"


@needs_setuptools
def test_source_archive_installs_without_a_compiler_and_runs_on_the_reference(sdist, tmp_path):
    build = [
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        tmp_path,
        sdist,
    ]
    done = run(*build, env=os.environ | {"CXX": "no-such-compiler", "UEGR_KERNELS_BUILD": ""})
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    there = Environment(sys.executable, tmp_path / "environment", wheel)
    done = there.run("-c", WITHOUT_LIBRARY)
    assert done.returncode == 0, done.stderr
    refusal, *report = done.stdout.splitlines()
    assert (
        "backend='cpp' cannot serve selective.selective_adamw_ on cpu"
    ) in refusal and REINSTALL in refusal
    assert "no-such-compiler was not found" in refusal
    assert str(there.root) in done.stdout and any(
        "cpp" in line and "not usable" in line for line in report
    )


COLLECTED = """
import sys, pytest
sys.modules.update(dict.fromkeys({frameworks}))  # as if they were not installed
sys.exit(pytest.main(["--collect-only", "--quiet", "--long"]))
"""


@pytest.mark.long
def test_every_test_is_collected_or_left_out_without_the_frameworks():
    named = (ROOT / "requirements-frameworks.txt").read_text()
    frameworks = [
        name.replace("-", "_") for name in re.findall(r"^([\w-]+)==", named, re.MULTILINE)
    ]
    assert {"transformers", "accelerate"} <= {*frameworks}
    found = run("-c", COLLECTED.format(frameworks=[*frameworks, "safetensors"]), cwd=ROOT)
    assert found.returncode == 0, found.stdout[-3000:]
