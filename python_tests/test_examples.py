"""The examples as a person runs them, with no network: each is short, and its loss falls."""

import ast
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# test_recipes/test_example.py runs this one, on data that it writes
WITH_DATA = [ROOT / "examples/stsb.py"]

OFFLINE = """
import json, runpy, socket, sys

def refuse(*_):
    raise OSError("an example asked for the network")

socket.socket.connect = refuse
print(json.dumps(runpy.run_path(sys.argv[1])["main"]()))
"""


def packages(tree: ast.Module) -> list[str]:
    """Returns what an example imports, by the names of the packages."""
    found = [
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [each.name for each in node.names]
        )
    ]
    needed = ["accelerate"] if "transformers" in " ".join(found) else []
    return sorted({name.partition(".")[0] for name in (*found, *needed)})


def test_there_is_an_example_for_each_framework():
    used = {name for file in EXAMPLES for name in packages(ast.parse(file.read_text()))}
    assert {"transformers", "peft", "sentence_transformers", "lightning", "trl"} <= used
    assert ROOT / "examples/loop.py" in EXAMPLES


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_short_and_says_how_it_is_run(file):
    text = file.read_text()
    assert len(text.splitlines()) < 60
    words = ast.get_docstring(ast.parse(text))
    assert f"python examples/{file.name}" in words and "pip install" in words
    assert "assert losses[-1] < losses[0]" in text.replace("model.losses", "losses")


@pytest.mark.parametrize(
    "file", [file for file in EXAMPLES if file not in WITH_DATA], ids=lambda file: file.stem
)
def test_loss_of_the_example_falls(file, tmp_path):
    for package in packages(ast.parse(file.read_text())):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (requirements-frameworks.txt, -models.txt)")
    inherited = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, file],
        cwd=tmp_path,
        env=inherited | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses[-1] < losses[0]
    assert not [path for path in tmp_path.iterdir() if path.suffix], "an example leaves files"
