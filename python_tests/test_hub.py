"""What `make hub` lays out, loaded by `kernels` as from the Hugging Face Kernel Hub, with no
network.
"""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from test_build import ROOT, Environment, run

from uegr_kernels.core import native

kernels = pytest.importorskip("kernels")

UNIVERSAL = "build/torch-universal"


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> pathlib.Path:
    """Gives the repository, linked from what `make build` has compiled."""
    ninja = run("-m", "ninja", "-n", "-f", "build/inplace/build.ninja", cwd=ROOT)
    if "no work to do" not in ninja.stdout or native.why_not():
        pytest.skip("what build/inplace holds is not of these sources; run `make build`")
    folder = tmp_path_factory.mktemp("hub") / "uegr-kernels"
    done = run("csrc/build_hub.py", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def without_package(tmp_path_factory) -> Environment:
    """Gives an environment that has torch and `kernels`, and not the package."""
    return Environment(sys.executable, tmp_path_factory.mktemp("environment") / "venv")


def variants(hub: pathlib.Path) -> list[pathlib.Path]:
    return sorted((hub / "build").iterdir())


def metadata(variant: pathlib.Path) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def test_layout(hub):
    """By the documentation's rules: names of variants, metadata, digests, relative imports."""
    rust = pytest.importorskip("kernels._rust")
    found = variants(hub)
    assert [re.sub(r"cpu-.*", "cpu", variant.name) for variant in found] == [
        "torch-stable-abi211-cpu",
        "torch-universal",
    ]
    for variant in found:
        read = kernels.Metadata.read_from_file(variant / "metadata.json")
        assert read.id.isidentifier() and read.name.python_name == "uegr_kernels"
        assert read.license == "Apache-2.0" and not read.python_depends
        read.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
        for file in variant.rglob("*.py"):
            absolute = re.search(r"^\s*(import|from) uegr_kernels", file.read_text(), re.MULTILINE)
            assert not absolute, f"{file} imports the package by its installed name"
    libraries = {file.parent.parent for file in hub.rglob("*.so")}
    assert libraries == {found[0]}, "the universal variant has no libraries"
    assert len({metadata(variant)["id"] for variant in found}) == 2


def test_another_state_of_the_sources_has_another_name(hub, tmp_path):
    """Two versions in one process must not register the same operators."""
    names = ("csrc", "uegr_kernels", "setup.py", "LICENSE")
    for name in names[:2]:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in names[2:]:
        shutil.copyfile(ROOT / name, tmp_path / name)
    digest = "import sys; sys.path.insert(0, 'csrc'); import build_hub; print(build_hub.digest())"
    before = run("-c", digest, cwd=tmp_path).stdout.strip()
    assert before and metadata(variants(hub)[0])["id"].endswith(before)
    with (tmp_path / "uegr_kernels/selective/reference.py").open("a") as file:
        file.write("# changed\n")
    assert run("-c", digest, cwd=tmp_path).stdout.strip() not in ("", before)


TRAIN = """
import importlib.util, pathlib, sys
import torch
from kernels import get_local_kernel

def train(uk, backend):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 5))
    optimizer = uk.SelectiveAdamW([weight], lr=0.1, seed=1, threshold=0.3, backend=backend)
    clean, adversarial, labels = torch.randn(8, 5), torch.randn(2, 8, 5), torch.arange(8) % 3
    for _ in range(2):
        optimizer.zero_grad()
        logits = clean @ weight.T, adversarial @ weight.T
        loss = uk.uegr_loss(*logits, labels, js_weight=0.5, backend=backend)
        loss.backward()
        optimizer.step()
    return loss.item(), weight.detach()

def agree(one, other):
    assert abs(one[0] - other[0]) < 1e-5
    torch.testing.assert_close(one[1], other[1])
"""
ALONE = """
folder, *expected = sys.argv[1:]
assert importlib.util.find_spec("uegr_kernels") is None
uk = get_local_kernel(pathlib.Path(folder))
assert uk.__name__ == expected[0]
reference = train(uk, "reference")
for backend in expected[1:]:
    agree(train(uk, backend), reference)
mine = [name for name in torch._C._dispatch_get_all_op_names() if "uegr" in name]
assert mine and all(name.startswith(f"{uk.__name__}::") for name in mine), mine
assert uk.recipes.NAMES and uk.analysis.selection_report
"""


def check(environment: Environment, code: str, *arguments, **variables: str) -> None:
    done = environment.run("-c", TRAIN + code, *arguments, HF_HUB_OFFLINE="1", **variables)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernel_trains_where_the_package_is_not_installed(hub, without_package):
    """`kernels` chooses the compiled variant on a CPU."""
    check(without_package, ALONE, hub, metadata(variants(hub)[0])["id"], "cpp", "auto")


def test_universal_variant_trains_on_the_reference_and_triton(hub, without_package):
    backends = ["auto", *(["triton"] if importlib.util.find_spec("triton") else [])]
    variant = hub / UNIVERSAL
    name = metadata(variant)["id"]
    check(without_package, ALONE, variant, name, *backends, TRITON_INTERPRET="1")


BESIDE = """
root, folder, universal, first = sys.argv[1:]
sys.path.insert(0, root)
if first == "installed":
    import uegr_kernels
kernel = get_local_kernel(pathlib.Path(folder))
import uegr_kernels
others = get_local_kernel(pathlib.Path(universal))
expected = train(uegr_kernels, "cpp")
agree(train(kernel, "cpp"), expected)
agree(train(others, "reference"), expected)
assert len({id(each.SelectiveAdamW) for each in (uegr_kernels, kernel, others)}) == 3
"""


@pytest.mark.parametrize("first", ["installed", "kernel"])
def test_kernels_train_beside_the_installed_package(hub, without_package, first):
    check(without_package, BESIDE, ROOT, hub, hub / UNIVERSAL, first)


FORWARDED = """
sys.path.insert(0, sys.argv[1])
import uegr_kernels
from uegr_kernels import SelectiveAdamW
assert SelectiveAdamW.__module__.startswith(sys.argv[2]), SelectiveAdamW.__module__
agree(train(uegr_kernels, "cpp"), train(uegr_kernels, "reference"))
"""


def test_folder_of_the_packages_name_is_the_kernel_too(hub, without_package):
    """Which older versions of `kernels` import."""
    variant = variants(hub)[0]
    check(without_package, FORWARDED, variant, metadata(variant)["id"])


def test_hub_is_not_laid_out_without_libraries(tmp_path):
    (tmp_path / "uegr_kernels").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "csrc/build_hub.py", "hub"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "run `make build`" in done.stderr
    assert not (tmp_path / "hub").exists()
