"""`python -m bench.gpu` without a GPU: the runner on stand-in stages, its plan, and every case
at a small size on the CPU.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time

import pytest
import torch

from bench import gpu, gpu_clusters, gpu_pytest, gpu_report, gpu_runner, gpu_stages, machine, timer
from bench.gpu_runner import ROOT, Output, Stage, Stop, Wave, alone, answer, run

HERE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


# ---- The runner, on stand-ins


def stand_in(name: str, lines: str, limit: float = 30.0, **more) -> Stage:
    """Gives a stage that runs a few lines of Python; `say` is what a stage answers by."""
    start = (
        f"import sys, os, time, signal, subprocess\nsys.path.insert(0, {str(ROOT)!r})\nfrom "
        "bench.gpu_runner import answer as say\n"
    )
    return Stage(name, (sys.executable, "-c", start + textwrap.dedent(lines)), limit, **more)


GOOD = "say({'said': 'good'})"


def ran(folder, *waves, seconds: float = 60.0, judge=lambda *_: None):
    """Gives the lines kept on the disk, by stage, and why the run stopped."""
    output = Output(folder)
    stop = run(list(waves), output, time.monotonic() + seconds, judge, lambda line: None)
    lines = gpu_report.read(folder / "gpu.jsonl")
    return {line["stage"]: line for line in lines}, stop


def alive(pid: int) -> bool:
    """Tells whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def written(path) -> int:
    """Gives the number that another process writes into a file."""
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    return int(path.read_text())


def test_a_stage_that_ends_badly_costs_the_others_nothing(tmp_path):
    stages = {
        "good": GOOD,
        "failed": "say({'half': 1}); print('the reason'); sys.exit(3)",
        "crashed": "say({'said': 'before'}); os.kill(os.getpid(), signal.SIGSEGV)",
        "cut": "say({'said': 'whole'}); open(os.environ['UEGR_GPU_ANSWER'], 'a').write('{\"said\": "
        "')",
        "silent": "pass",
        "list": "open(os.environ['UEGR_GPU_ANSWER'], 'a').write('[1, 2]\\n3\\n')",
        "last": GOOD,
    }
    lines, stop = ran(
        tmp_path / "new", *(alone(stand_in(name, program)) for name, program in stages.items())
    )
    assert stop is None and list(lines) == list(stages)
    assert [lines[name]["status"] for name in ("good", "last")] == ["passed", "passed"]
    of_the_run = {key: lines["failed"].pop(key) for key in ("run", "seconds")}
    assert 0 < of_the_run["seconds"] < 30
    expected = {
        "stage": "failed",
        "status": "failed",
        "limit": 30.0,
        "exit": 3,
        "message": "the reason",
        "result": {"half": 1},
    }
    assert lines["failed"] == expected
    assert lines["crashed"]["status"] == "crashed" and "SIGSEGV" in lines["crashed"]["message"]
    assert lines["crashed"]["result"] == {"said": "before"}
    assert (
        lines["cut"]["status"] == "failed"
        and "cut off" in lines["cut"]["message"]
        and lines["cut"]["result"] == {"said": "whole"}
    )
    assert (
        lines["silent"]["status"] == "failed"
        and lines["silent"]["message"] == "it ended without an answer"
    )
    assert lines["list"]["status"] == "failed" and "cut off" in lines["list"]["message"]
    with tarfile.open(tmp_path / "new" / "logs.tar.gz") as archive:
        logs = {name.split("-")[-1]: name for name in archive.getnames()}
        assert archive.extractfile(logs["failed.txt"]).read() == b"the reason\n"


ODD = {
    "deep": "open(os.environ['UEGR_GPU_ANSWER'], 'a').write('[' * 200_000 + chr(10))",
    "pairs": "open(os.environ['UEGR_GPU_ANSWER'], 'a').write('[\"ab\"]' + chr(10))",
    "surrogate": "say({'said': 'x' + chr(0xd800)})",
    "types": "say({'expected': 'x', 'failed': 3, 'contestants': 5})",
    "lines": "say({'said': 'a\\nb' + chr(0x2028) + 'c'})",
    "raw": "open(os.environ['UEGR_GPU_ANSWER'], 'ab').write(b'{\"said\": \"a\\xe2\\x80\\xa8b\"}' + "
    "bytes([10]))",
    "loud": "sys.stdout.buffer.write(bytes([255, 0, 10]) * 3_000_000); say({'said': 'loud'}); "
    "sys.exit(1)",
}


def test_odd_answers_and_a_command_that_is_not_there_cost_the_others_nothing(
    tmp_path, monkeypatch, capsys
):
    stages = [stand_in("first", GOOD), *(stand_in(name, program) for name, program in ODD.items())]
    stages += [Stage("absent", (str(tmp_path / "no such program"),), 5.0), stand_in("last", GOOD)]
    monkeypatch.setattr(gpu, "PROBE", stand_in("probe", "say({'no_gpu': None, 'backends': {}})"))
    monkeypatch.setattr(gpu, "plan", lambda: list(map(alone, stages)))
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    lines = {line["stage"]: line for line in gpu_report.read(tmp_path / "out" / "gpu.jsonl")}
    failed = [name for name, line in lines.items() if line["status"] == "failed"]
    assert failed == ["deep", "pairs", "loud", "absent"] and list(lines) == [
        "probe",
        *(stage.name for stage in stages),
    ]
    assert ("it could not be started: ") in lines["absent"][
        "message"
    ] and "no such program" in lines["absent"]["message"]
    assert lines["raw"]["result"] == {"said": "a\u2028b"}
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert (
        "| first | passed |" in text
        and "| types | passed |" in text
        and ("its answer is not as expected") in text
    )
    assert text.splitlines() == text.split("\n")[:-1] and "| lines | passed |" in text
    assert re.search(r"surrogate passed [\d.]+ s x\\ud800", capsys.readouterr().out)
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        (loud,) = [member for member in archive if member.name.endswith("loud.txt")]
        assert loud.size <= gpu_runner.LOG + 100


def test_a_program_of_others_that_does_not_work_here_is_left_out(tmp_path):
    """A sanitizer that knows no such GPU finds no mistake; one that has begun does."""
    stages = {
        "cannot": "print('Device not supported'); sys.exit(4)",
        "finds": "say({'begun': True}); print('a race'); sys.exit(1)",
    }
    stages = [
        stand_in(name, program, program=sys.executable, backend="cuda")
        for name, program in stages.items()
    ]
    lines, stop = ran(
        tmp_path, *map(alone, stages), alone(stand_in("after", GOOD)), judge=gpu.judge
    )
    assert stop is None and lines["after"]["status"] == "passed"
    assert lines["cannot"]["status"] == "left out" and lines["cannot"]["message"].endswith(
        "does not work here: Device not supported"
    )
    assert lines["finds"]["status"] == "failed" and lines["finds"]["message"] == "a race"


def test_a_stage_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    """As one that waits for a driver."""
    killpg = os.killpg
    monkeypatch.setattr(gpu_runner.os, "kill", lambda *_: None)
    monkeypatch.setattr(gpu_runner.os, "killpg", lambda *_: None)
    monkeypatch.setattr(gpu_runner, "DEATH", 0.1)
    try:
        lines, _ = ran(
            tmp_path,
            alone(stand_in("stays", "say({'pid': os.getpid()}); time.sleep(60)", 3.0)),
            alone(stand_in("after", GOOD)),
        )
        assert lines["stays"]["status"] == "killed" and lines["after"]["status"] == "passed"
    finally:
        monkeypatch.undo()
        killpg(lines["stays"]["result"]["pid"], signal.SIGKILL)


def test_a_full_disk_ends_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_runner.Output, "_put", full)
    monkeypatch.setattr(gpu, "PROBE", stand_in("probe", "say({'no_gpu': None, 'backends': {}})"))
    monkeypatch.setattr(gpu, "plan", lambda: [alone(stand_in("good", GOOD))])
    assert gpu.main(["--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ("good is not kept: [Errno 28] No space left on device") in out and re.search(
        r"good passed [\d.]+ s good", out
    )


def test_a_stage_that_hangs_is_killed_at_its_limit_with_all_it_started(tmp_path):
    program = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ignoring = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'
    command = [sys.executable, '-c', ignoring]
    children = [subprocess.Popen(command, start_new_session=away).pid for away in (False, True)]
    say({'children': children})
    time.sleep(60)
    """
    started = time.monotonic()
    lines, _ = ran(tmp_path, alone(stand_in("hangs", program, 3.0)), alone(stand_in("after", GOOD)))
    assert time.monotonic() - started < 20
    assert (
        lines["hangs"]["status"] == "killed"
        and "at its limit" in lines["hangs"]["message"]
        and lines["after"]["status"] == "passed"
    )
    assert len(lines["hangs"]["result"]["children"]) == 2 and not any(
        map(alive, lines["hangs"]["result"]["children"])
    )


def test_a_stage_that_heeds_sigterm_keeps_what_it_says_then(tmp_path):
    program = """
    signal.signal(signal.SIGTERM, lambda *_: (say({'said': 'last words'}), sys.exit(0)))
    time.sleep(60)
    """
    lines, _ = ran(tmp_path, alone(stand_in("heeds", program, 3.0)))
    assert lines["heeds"]["status"] == "killed" and lines["heeds"]["result"] == {
        "said": "last words"
    }


@pytest.mark.parametrize("away", [False, True], ids=["in its group", "in a session of its own"])
def test_a_child_left_behind_is_dead_afterwards(tmp_path, away):
    program = f"""
    child = subprocess.Popen(['sleep', '60'], start_new_session={away}, stdout=subprocess.DEVNULL)
    say({{'child': child.pid}})
    """
    lines, _ = ran(tmp_path, alone(stand_in("leaves", program)))
    assert lines["leaves"]["status"] == "passed" and lines["leaves"]["left_behind"] == 1
    assert not alive(lines["leaves"]["result"]["child"])


def test_the_last_stages_fall_at_the_budgets_end_and_say_so(tmp_path):
    waves = [
        alone(stand_in("first", GOOD, 10)),
        Wave((stand_in("long", GOOD, 50), stand_in("beside", GOOD, 1)), 50),
        alone(stand_in("short", GOOD, 1)),
    ]
    lines, stop = ran(tmp_path, *waves, seconds=30)
    assert stop is None and lines["first"]["status"] == "passed"
    assert [lines[name]["status"] for name in ("long", "beside", "short")] == ["left out"] * 3
    assert re.fullmatch(r"\d+ s were left, and it may take 50", lines["long"]["message"])
    assert lines["short"]["message"] == "an earlier stage had fallen for lack of time"


def test_stages_of_a_wave_share_its_limit(tmp_path):
    sleeps = "time.sleep(60)"
    stages = (
        stand_in("one", sleeps),
        stand_in("two", GOOD),
        stand_in("three", sleeps),
        stand_in("four", GOOD),
    )
    lines, _ = ran(tmp_path, Wave(stages, 4.0, at_once=2))
    assert [lines[name]["status"] for name in ("one", "two", "three", "four")] == [
        "killed",
        "passed",
        "killed",
        "left out",
    ]
    assert lines["four"]["message"] == "the stages beside it took all the time they had together"


def test_a_program_that_is_not_there_is_named(tmp_path):
    lines, _ = ran(
        tmp_path,
        alone(stand_in("needs", GOOD, program="no-such-program")),
        alone(stand_in("after", GOOD)),
    )
    assert (
        lines["needs"]["status"] == "left out"
        and lines["needs"]["message"] == "no-such-program was not found"
    )
    assert lines["after"]["status"] == "passed"


def test_what_ran_before_the_runner_is_killed_is_kept(tmp_path):
    hangs = (
        f"print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True); time.sleep(60)"
    )
    program = f"""
import pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "python_tests")!r}]
from test_bench_gpu import GOOD, alone, ran, stand_in
stages = alone(stand_in("first", GOOD)), alone(stand_in("hangs", {hangs!r}, 60))
ran(pathlib.Path({str(tmp_path / "out")!r}), *stages, seconds=100)
"""
    runner = subprocess.Popen([sys.executable, "-c", program], env=os.environ | HERE)
    try:
        stage = written(tmp_path / "pid")
        runner.send_signal(signal.SIGKILL)
    finally:
        runner.kill()
        runner.wait()
    until = time.monotonic() + 5
    while alive(stage) and time.monotonic() < until:
        time.sleep(0.05)
    # the kernel ends it with its parent
    assert not alive(stage)
    lines = [json.loads(text) for text in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["status"]) for line in lines] == [("first", "passed")]


# ---- What stops a run


def judged(stage: Stage, line: dict) -> Stop | None:
    return gpu.judge(stage, {"stage": stage.name, "status": "passed", "exit": 0} | line)


def test_another_backend_than_the_one_to_measure_stops_the_run_at_once(tmp_path):
    waves = [
        alone(stand_in("right", "say({'backend': 'cuda'})", backend="cuda")),
        Wave(
            (
                stand_in("wrong", "say({'backend': 'triton'})", backend="cuda"),
                stand_in("beside", "time.sleep(60)"),
            ),
            60,
            at_once=2,
        ),
        alone(stand_in("after", GOOD)),
    ]
    lines, stop = ran(tmp_path, *waves, seconds=200, judge=gpu.judge)
    assert stop == Stop(4, "wrong was to measure cuda, and the backend in use is triton")
    assert [lines[name]["status"] for name in ("right", "wrong", "beside", "after")] == [
        "passed",
        "passed",
        "left out",
        "left out",
    ]
    assert lines["after"]["message"] == f"stopped: {stop.reason}"
    assert judged(
        stand_in("case", ""), {"status": "failed", "exit": 4, "message": "words"}
    ) == Stop(4, "words")
    # pytest's own 4
    usage = {"status": "failed", "exit": 4, "message": "ImportError while loading conftest"}
    assert judged(stand_in("tests", "", least_tests=40), usage).status == 5


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            {"expected": 46, "passed": 40, "skipped": ["test_a (no reason)"]},
            "40 of 46 tests ran; skipped: test_a (no reason)",
        ),
        ({"expected": 46, "passed": 45}, "45 of 46 tests ran"),
        ({"expected": 20, "passed": 20}, "20 tests were found, at least 40 are expected"),
        ({"expected": 46, "collected": 0}, "0 of 46 tests ran"),
        ({}, "0 tests were found, at least 40 are expected"),
        ({"expected": 46, "passed": 44, "failed": ["a"], "excused": 1}, None),
        ({"expected": 46, "collected": 46}, None),
    ],
    ids=str,
)
def test_too_few_tests_stop_the_run(result, words):
    stop = judged(stand_in("tests", "", least_tests=40), {"result": result})
    assert stop == (words and Stop(5, f"tests: {words}"))


def test_tests_cut_short_by_a_limit_or_a_crash_stop_nothing():
    for status in ("killed", "crashed"):
        assert (
            judged(
                stand_in("tests", "", least_tests=40),
                {"status": status, "result": {"expected": 46, "passed": 3}},
            )
            is None
        )


def test_the_probe_is_judged():
    backends = {"cuda": None, "triton": None, "auto": "cuda"}
    found = {"status": "passed", "result": {"no_gpu": None, "backends": backends}}
    assert gpu.judge_probe(found, ["cuda", "triton"], False) is None
    other = {
        "status": "passed",
        "result": {"no_gpu": None, "backends": backends | {"auto": "triton"}},
    }
    assert gpu.judge_probe(other, ["cuda"], False) == Stop(
        4, "cuda was to be measured, and the backend in use is triton"
    )
    assert gpu.judge_probe(other, ["triton"], False) is None
    unbuilt = {
        "status": "passed",
        "result": {"no_gpu": None, "backends": backends | {"cuda": "not built", "auto": "triton"}},
    }
    stop = gpu.judge_probe(unbuilt, ["cuda"], False)
    assert stop.status == 4 and "cannot be: not built; --stages tests-triton,triton" in stop.reason
    without = {
        "status": "passed",
        "result": {"no_gpu": None, "backends": backends | {"triton": "not installed"}},
    }
    stop = gpu.judge_probe(without, ["cuda", "triton"], False)
    assert (
        stop.status == 4
        and ("cannot be: not installed; --stages smoke,tests-cuda,bench") in stop.reason
    )
    none = {"status": "passed", "result": {"no_gpu": "no driver", "backends": {"cuda": None}}}
    assert gpu.judge_probe(none, ["cuda"], False) == Stop(3, "No GPU was found: no driver")
    assert gpu.judge_probe(none, ["cuda"], True) is None
    assert (
        gpu.judge_probe(
            {"status": "killed", "message": "killed at its limit"}, ["cuda"], False
        ).status
        == 3
    )
    lacking = {"status": "failed", "message": "ModuleNotFoundError: No module named 'torch'"}
    assert (
        f"start bench.gpu with a Python that has it, not with {sys.executable}"
    ) in gpu.judge_probe(lacking, ["cuda"], False).reason
    # the copy alone took too long
    said_before = {"status": "killed", "message": "killed", "result": found["result"]}
    assert gpu.judge_probe(said_before, ["cuda"], False) is None


@pytest.mark.long
def test_a_probe_that_is_killed_is_tried_once_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "plan", list)
    slow = f"""
    if not os.path.exists({str(tmp_path / "warm")!r}):
        open({str(tmp_path / "warm")!r}, "w")
        time.sleep(60)
    say({{'no_gpu': None, 'backends': {{}}}})
    """
    for program, status, last in ((slow, 0, "passed"), ("time.sleep(60)", 3, "killed")):
        monkeypatch.setattr(gpu, "PROBE", stand_in("probe", program, 3.0))
        assert gpu.main(["--output", str(tmp_path / last)]) == status
        lines = gpu_report.read(tmp_path / last / "gpu.jsonl")
        assert [(line["stage"], line["status"]) for line in lines[:2]] == [
            ("probe", "killed"),
            ("probe-again", last),
        ]
    assert "the probe came to no answer (killed at its limit" in capsys.readouterr().out


def built_on_the_spot(tmp_path, monkeypatch, why_not_after: str | None):
    """Gives a run whose probe finds no library but nvcc, and a stand-in for the build."""
    after = tmp_path / "built"
    facts = {"no_gpu": None, "cuda": "13.0", "nvcc": "/nvcc", "capability": "9.0"}
    program = f"""
    why = {why_not_after!r} if os.path.exists({str(after)!r}) else 'no library'
    auto = 'triton' if why else 'cuda'
    say({facts!r} | {{'backends': {{'cuda': why, 'triton': None, 'auto': auto}}}})
    """
    monkeypatch.setattr(gpu, "PROBE", stand_in("probe", program))
    building = f"open({str(after)!r}, 'w').write(os.environ['TORCH_CUDA_ARCH_LIST'])"
    monkeypatch.setattr(
        gpu, "builder", lambda limit: stand_in("build", building, limit, silent=True)
    )
    monkeypatch.setattr(
        gpu,
        "plan",
        lambda: [alone(stand_in("bench-step", "say({'backend': 'cuda'})", backend="cuda"))],
    )
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    status = gpu.main(["--output", str(tmp_path / "out")])
    return status, [
        (line["stage"], line["status"]) for line in gpu_report.read(tmp_path / "out" / "gpu.jsonl")
    ]


def test_what_does_not_load_is_built_for_this_gpu_and_looked_at_anew(tmp_path, monkeypatch):
    found = built_on_the_spot(tmp_path, monkeypatch, None)
    assert found == (
        0,
        [
            ("probe", "passed"),
            ("build", "passed"),
            ("probe-after-build", "passed"),
            ("bench-step", "passed"),
        ],
    )
    assert (tmp_path / "built").read_text() == "9.0"


def test_a_library_that_does_not_load_after_a_build_either_stops_the_run(
    tmp_path, monkeypatch, capsys
):
    status, lines = built_on_the_spot(tmp_path, monkeypatch, "still none")
    assert status == 4 and lines == [
        ("probe", "passed"),
        ("build", "passed"),
        ("probe-after-build", "passed"),
        ("end", "stopped"),
    ]
    assert "Stopped: cuda was to be measured and cannot be: still none" in capsys.readouterr().out


# ---- The command line


def test_a_run_that_is_asked_to_stop_ends_its_stages_and_keeps_what_it_has(tmp_path):
    """Nor does a terminal that is gone end it."""
    hangs = (
        f"print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True); time.sleep(60)"
    )
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "python_tests")!r}]
from test_bench_gpu import GOOD, alone, gpu, stand_in
gpu.PROBE = stand_in("probe", "say({{'no_gpu': None, 'backends': {{'auto': 'cuda'}}}})")
hangs = stand_in("hangs", {hangs!r}, 60)
gpu.plan = lambda: [alone(stand_in("first", GOOD)), alone(hangs), alone(stand_in("after", GOOD))]
sys.exit(gpu.main(["--output", {str(tmp_path / "out")!r}]))
"""
    command = [sys.executable, "-c", program]
    runner = subprocess.Popen(
        command, env=os.environ | HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    runner.stdout.close()
    try:
        stage = written(tmp_path / "pid")
        # as a connection that breaks does
        runner.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert runner.poll() is None and alive(stage)
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(30) == 130 and not alive(stage)
    finally:
        runner.kill()
        runner.wait()
    lines = gpu_report.read(tmp_path / "out" / "gpu.jsonl")
    assert [(line["stage"], line["status"]) for line in lines] == [
        ("probe", "passed"),
        ("first", "passed"),
        ("end", "stopped"),
    ]
    assert "Stopped: Ctrl-C or SIGTERM" in (tmp_path / "out" / "gpu.md").read_text()


def test_make_gpu_takes_the_environment_that_is_there_and_installs_nothing(tmp_path):
    """The first that has a torch for GPUs, else the one that says what is missing."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    pythons = {name: tmp_path / name / "bin" / "python" for name in ("ours", "systems")}
    for has, expected in (
        ({"ours", "systems"}, "ours"),
        ({"systems"}, "systems"),
        (set(), "systems"),
    ):
        for name, path in pythons.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f'#!/bin/sh\nif [ "$1" = -c ]; then exit {int(name not in has)}; '
                f'fi\necho {name} "$@"\n'
            )
            path.chmod(0o755)
        command = [
            "make",
            "-s",
            "gpu",
            f"VENV={tmp_path / 'ours'}",
            f"PYTHON={pythons['systems']}",
            "ARGS=--budget 240",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == f"{expected} -m bench.gpu --budget 240\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(tmp_path):
    for arguments, status, words in (
        ([], 3, "No GPU was found: torch"),
        (["--dry-run"], 4, "cuda was to be measured and cannot be"),
    ):
        if arguments and torch.version.cuda:
            # there it builds
            continue
        command = [sys.executable, "-m", "bench.gpu", *arguments, "--output", str(tmp_path / "new")]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | HERE, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert words in done.stdout and f"Exit status {status}" in done.stdout
        lines = gpu_report.read(tmp_path / "new" / "gpu.jsonl")
        assert (
            lines[-1]["stage"] == "end"
            and words in lines[-1]["message"]
            and lines[0]["stage"] == "probe"
        )
        assert words in (tmp_path / "new" / "gpu.md").read_text()


def test_the_parent_imports_neither_torch_nor_the_package():
    program = (
        "import sys, bench.gpu; print(sorted({'torch', 'uegr_kernels', 'numpy'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--stages", "smoke,nonsense,bench"],
            "--stages has nonsense; there are smoke, tests, bench, check, profile, compile",
        ),
        (
            ["--stages", "bench-nonsense"],
            "--stages has bench-nonsense; .* bench-step, bench-previous",
        ),
        (["--stages", ""], "--stages names no stage"),
        (["--stages", " , "], "--stages names no stage"),
        (["--budget", "0"], "--budget 0 is too little"),
        (["--budget", "-1"], "--budget -1 is too little"),
        (["--budget", "abc"], "invalid float value: 'abc'"),
        (["--budget", "5"], "--budget 5 is too little for the probe; give 34 seconds or more"),
        (["--budget", "nan"], "--budget nan is too little"),
        (["--budget", "inf"], "--budget inf is too little"),
        (["--build-only", "--dry-run"], "--build-only takes no --dry-run"),
        (["--build-only", "--stages", "smoke"], "--build-only takes no"),
        (["--nonsense"], "unrecognized arguments"),
    ],
    ids=str,
)
def test_wrong_arguments_are_said_and_nothing_is_made(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        gpu.main(["--output", str(tmp_path / "new"), *arguments])
    assert error.value.code == 2
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "new").exists()


def test_the_least_budget_is_enough_for_the_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "PROBE", stand_in("probe", "say({'no_gpu': None, 'backends': {}})", 5.0)
    )
    monkeypatch.setattr(gpu, "plan", lambda: [alone(stand_in("good", GOOD))])
    assert gpu.main(["--budget", "14", "--output", str(tmp_path)]) == 0
    assert [line["status"] for line in gpu_report.read(tmp_path / "gpu.jsonl")] == [
        "passed",
        "left out",
    ]


def test_stages_are_chosen_by_name_or_first_word():
    def names(wanted):
        return [stage.name for wave in gpu.chosen(gpu.plan(), wanted) for stage in wave.stages]

    assert names("bench-step,tests") == ["tests-cuda", "bench-step", "tests-triton"]
    assert names(" bench-step, bench-fgm ,") == ["bench-step", "bench-fgm"]
    assert names("smoke") == [f"smoke-{name}" for name in gpu.SMOKE]
    assert names("compile") == [f"compile-{name}" for name in gpu.COMPILED]
    assert names("probe") == []
    # what is advised leaves nothing out, and brings nothing else
    for backend, other in (("cuda", "triton"), ("triton", "cuda")):
        advised = re.search(r"--stages (\S+)", gpu.ALONE[backend])[1]
        everything = [stage for wave in gpu.plan() for stage in wave.stages]
        found = [
            stage.name
            for stage in everything
            if stage.backend == other or (stage.backend is None and other == "cuda")
        ]
        assert names(advised) == found


# ---- The folder of results


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for others in (["a", "b", "c"], ["folder"]):
        folder = tmp_path / "-".join(others)
        folder.mkdir(exist_ok=True)
        for name in others:
            (folder / name).mkdir() if name == "folder" else (folder / name).write_text("theirs")
        with pytest.raises(SystemExit):
            gpu.main(["--output", str(folder)])
        assert "name a new folder" in capsys.readouterr().err
        assert sorted(path.name for path in folder.iterdir()) == others
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path / "file")])
    assert (
        "is a file; name a folder" in capsys.readouterr().err
        and (tmp_path / "file").read_text() == "theirs"
    )


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, capsys):
    with Output(tmp_path).claimed(), pytest.raises(SystemExit) as error:
        gpu.main(["--output", str(tmp_path)])
    assert error.value.code == 2 and "another run is writing to --output" in capsys.readouterr().err
    with Output(tmp_path).claimed():
        pass


def test_of_an_archive_of_logs_that_is_cut_off_the_rest_is_kept(tmp_path):
    for name in ("first", "second"):
        ran(tmp_path, alone(stand_in(name, f"print(os.urandom(100_000)); {GOOD}")))
    whole = (tmp_path / "logs.tar.gz").read_bytes()
    (tmp_path / "logs.tar.gz").write_bytes(whole[: len(whole) * 3 // 4])
    assert [name.split("-")[-1] for name in Output(tmp_path).logs] == ["first.txt"]
    (tmp_path / "logs.tar.gz").write_bytes(whole[:-9] + b"?" * 9)
    assert len(Output(tmp_path).logs) >= 1


def test_a_second_run_adds_to_the_first_and_the_folder_stays_small(tmp_path):
    # as by `| tee DIR/log`
    (tmp_path / "log").write_text("the user's own")
    ran(tmp_path, alone(stand_in("first", f"print('hello'); {GOOD}")))
    with (tmp_path / "gpu.jsonl").open("a") as file:
        # as a killed run leaves it
        file.write('{"stage": "half')
    # a run is named by its second
    time.sleep(1.1)
    ran(tmp_path, alone(stand_in("second", f"print('hello'); {GOOD}")))
    text = gpu_report.close(Output(tmp_path), 0)
    assert [line["stage"] for line in gpu_report.read(tmp_path / "gpu.jsonl")] == [
        "first",
        "second",
    ]
    assert (tmp_path / "gpu.md").read_text() == f"# GPU\n\n{text}\n" and "second" in text
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert [member.split("-")[-1] for member in archive.getnames()] == [
            "first.txt",
            "second.txt",
        ]
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) <= 6 and all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert (tmp_path / "log").read_text() == "the user's own"


def ran_case(name: str, contestants: int) -> dict:
    spread = {"median": 2e-6, "q1": 1e-6, "q3": 3e-6}
    figures = {
        "seconds": spread,
        "bytes": 100,
        "gb_s": 1.0,
        "copy_share": 0.5,
        "parts": {"forward": spread},
    }
    peers = [
        {"name": f"peer {i}", "ours_over_this": {"median": 0.5, "q1": 0.4, "q3": 0.6}} | figures
        for i in range(contestants)
    ]
    missing = {"name": "torch.compile", "missing": "no | memory " * 20}
    result = {
        "case": f"case {name}",
        "contestants": [{"name": "uegr_kernels"} | figures, *peers, missing],
    }
    return {"run": "r", "stage": name, "status": "passed", "seconds": 1.0, "result": result}


def test_the_closing_table_says_what_was_found_and_fits():
    probe = {
        "run": "r",
        "stage": "probe",
        "status": "passed",
        "seconds": 1.0,
        "result": {"copy_rate": 4300.0, "gpu": "G", "torch": "2.11.0"},
    }
    failed = {
        "run": "r",
        "stage": "smoke-rank",
        "status": "failed",
        "seconds": 1.0,
        "message": "ours is wrong: x | y",
    }
    tests = {
        "run": "q",
        "stage": "tests-cuda",
        "status": "failed",
        "seconds": 9.0,
        "result": {"expected": 46, "passed": 45, "failed": ["test_a"]},
    }
    text = gpu_report.closing([probe, failed, tests, ran_case("bench-step", 1)], "r", 1)
    assert text.startswith(
        "A copy moves 4,300 GB/s. gpu G; torch 2.11.0\nPassed: probe, bench-step. Exit status 1."
    )
    assert "| smoke-rank | failed | 1.0 s | ours is wrong: x / y |" in text
    assert (
        "| tests-cuda (run q) | failed | 9.0 s | 45 of 46 tests passed, 1 failed: test_a |"
    ) in text
    assert "| bench-step: case bench-step | uegr_kernels | 2 (1-3), forward 2 |  | 50% |" in text
    assert "|  | peer 0 | 2 (1-3), forward 2 | 0.5 (0.4-0.6) | 50% |" in text
    everything = [
        probe,
        *(
            {"run": "r", "stage": f"s{i}", "status": "killed", "message": "word " * 500}
            for i in range(90)
        ),
    ]
    for lines in (
        everything,
        everything + [ran_case(f"c{i}", 5) for i in range(40)],
        [ran_case(f"c{i}", 12) for i in range(40)],
    ):
        text = gpu_report.closing(lines, "r", 1)
        assert len(text.splitlines()) <= 100 and len(text) <= 12_000
        assert re.search(r"\(\d+ lines more are in gpu.jsonl\)$", text)


def test_measured_shares_stand_beside_calculated_ones():
    names = {line["case"] for line in json.loads(gpu_report.MODEL.read_text())["records"]}
    assert {name for kernels in gpu_report.CALCULATED.values() for name in kernels} <= names
    assert set(gpu_report.CALCULATED) <= {f"bench-{name}" for name in gpu_stages.BENCHES}
    probe = {"run": "r", "stage": "probe", "status": "passed", "seconds": 1.0}
    for gpu_name, expected in (("NVIDIA H200", r"50% \(\d+% calculated\)"), ("NVIDIA L4", "50%")):
        lines = [probe | {"result": {"copy_rate": 4300.0, "gpu": gpu_name}}]
        lines.append(ran_case("bench-loss-32000", 1))
        ours, peer = gpu_report.case_rows(lines)[3:5]
        assert re.search(rf"\| {expected} \|$", ours), ours
        assert peer.endswith("| 50% |")
    # the norm reads the gradient before the step does: 8 bytes an element in the time of 12
    shares = gpu_report.calculated([{"result": {"gpu": "NVIDIA H200"}}])
    assert math.isclose(shares["bench-fgm"], 8 / 12, rel_tol=0.01)


def test_the_table_of_a_whole_run_fits():
    lines = []
    for stage in (stage for wave in gpu.plan() for stage in wave.stages):
        if re.match("bench|compiled|triton", stage.name):
            line = ran_case(stage.name, 11 if stage.name == "triton-sweep" else 2)
            # none is missing
            line["result"]["contestants"].pop()
        else:
            result = (
                {"expected": 46, "passed": 46}
                if stage.least_tests
                else {"said": "words " * 9}
                if "smoke" not in stage.name
                else {}
            )
            line = {
                "run": "r",
                "stage": stage.name,
                "status": "passed",
                "seconds": 99.9,
                "result": result,
            }
        lines.append(line)
    text = gpu_report.closing(lines, "r", 0)
    assert (
        "| triton-sweep" in text
        and "lines more" not in text
        and len(text.splitlines()) <= 100
        and len(text) <= 12_000
    )


@pytest.mark.long
def test_a_case_goes_through_to_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    facts = {"no_gpu": None, "gpu": "G", "copy_rate": 4300.0, "backends": {"auto": "cuda"}}
    monkeypatch.setattr(gpu, "PROBE", stand_in("probe", f"say({facts!r})"))
    case = gpu.case("bench-fgm", 60, "--device", "cpu", "--small", backend=None)
    odd = stand_in("odd", "say({'contestants': [{'name': 1}], 'copy_rate': {}, 'case': 'odd'})")
    monkeypatch.setattr(gpu, "plan", lambda: [alone(case), *odds])
    for odds, printed in (
        ([], "| bench-fgm: FGM, embeddings, 4 x 16 x 64 | uegr_kernels |"),
        ([alone(odd)], "odd passed (its answer is not"),
    ):
        monkeypatch.chdir(tmp_path)
        # of where the user stands
        folder = pathlib.Path(f"{len(odds)} odd")
        assert gpu.main(["--output", str(folder)]) == 0
        out = capsys.readouterr().out
        assert out.startswith("A copy moves 4,300 GB/s") and re.search(
            r"bench-fgm passed [\d.]+ s "
            r"[\d.,]+ us, \d+% of a "
            r"copy, ",
            out,
        )
        assert printed in out
        assert len((folder / "gpu.md").read_text().splitlines()) <= 102
        assert (folder / "gpu.png").exists() == bool(importlib.util.find_spec("matplotlib"))


def test_a_stage_left_out_leaves_an_earlier_runs_figures(tmp_path):
    lines = [
        ran_case("bench-step", 1),
        {"run": "s", "stage": "bench-step", "status": "left out", "message": "no time"},
    ]
    lines += [{"run": "r", "stage": "end", "status": "stopped", "message": "old"}]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu_report.latest(tmp_path, "s") == lines[:1]


# ---- The plan


def test_the_limits_keep_the_promises():
    """Eight minutes for everything; four for correctness and the main benchmarks."""
    waves = gpu.plan()
    names = [stage.name for wave in waves for stage in wave.stages]
    assert len(set(names)) == len(names) and all(
        re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names
    )
    assert gpu.PROBE.limit + sum(wave.limit for wave in waves) + gpu.CLOSING <= gpu.BUDGET == 480
    fits, left = [], 240 - gpu.PROBE.limit - gpu.CLOSING
    for wave in waves:
        left -= wave.limit
        fits += [stage.name for stage in wave.stages] if left >= 0 else []
    assert fits == [
        *(f"smoke-{name}" for name in gpu.SMOKE),
        "tests-cuda",
        *(f"bench-{name}" for name in gpu.MAIN),
    ]
    assert {"step", "previous", "bfloat16", "1e9", "loss-32000", "dropout", "fgm"} <= set(gpu.MAIN)
    for wave in waves:
        assert all(stage.limit <= wave.limit for stage in wave.stages) or len(wave.stages) > 1


def test_where_processes_start_slowly_the_limits_are_higher(tmp_path, monkeypatch):
    def limits(waves):
        return [(wave.limit, *(stage.limit for stage in wave.stages)) for wave in waves]

    waves = [
        alone(stand_in("a", GOOD, 12.0)),
        Wave(tuple(stand_in(name, GOOD, 5.0) for name in "bcd"), 11.0, at_once=2),
    ]
    assert limits(gpu.raised(waves, 6.0)) == limits(waves) == [(12.0, 12.0), (11.0, 5.0, 5.0, 5.0)]
    assert limits(gpu.raised(waves, gpu.START + 3)) == [(15.0, 15.0), (17.0, 8.0, 8.0, 8.0)]
    assert limits(gpu.raised(waves[:1], 1000.0)) == [(12.0 + gpu.MOST,) * 2]
    monkeypatch.setattr(gpu, "START", -100.0)
    monkeypatch.setattr(gpu, "PROBE", stand_in("probe", "say({'no_gpu': None, 'backends': {}})"))
    monkeypatch.setattr(gpu, "plan", lambda: waves[:1])
    assert gpu.main(["--output", str(tmp_path)]) == 0
    assert [line["limit"] for line in gpu_report.read(tmp_path / "gpu.jsonl")] == [
        30.0,
        12.0 + gpu.MOST,
    ]


def test_every_case_of_the_plan_is_one():
    for wave in gpu.plan():
        for stage in wave.stages:
            if "bench.gpu_stages" in stage.command:
                assert (
                    stage.command[stage.command.index("bench.gpu_stages") + 1] in gpu_stages.CASES
                )
    assert {f"smoke-{name}" for name in gpu.SMOKE} == {
        name for name in gpu_stages.CASES if name.startswith("smoke")
    }
    assert not re.search("unknown", str(gpu.plan()))


# ---- The tests that the runner runs


ALLOWED = ("torch", "numpy", "pytest", "hypothesis")


def needs(names) -> set[str]:
    """Gives these distributions and what they need, in turn; extras aside."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub("[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [
            re.match("[A-Za-z0-9._-]+", text)[0] for text in required if "extra ==" not in text
        ]
    return found


# [triton] would be left out
@pytest.mark.parametrize("backend", gpu.TESTS, ids=lambda name: f"of_{name}")
def test_gpu_tests_are_all_collected_where_nothing_is_installed_but_what_they_need(
    tmp_path, backend
):
    allowed = needs(ALLOWED)
    owners = importlib.metadata.packages_distributions()
    forbidden = {
        name
        for name, of in owners.items()
        if not any(re.sub("[-_.]+", "-", one).lower() in allowed for one in of)
    }
    assert {
        name for name in ("scipy", "expecttest", "matplotlib") if importlib.util.find_spec(name)
    } <= forbidden
    program = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = {sorted(forbidden - {"uegr_kernels"})!r}
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name in absent else find(name, *rest)
)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
    stage = gpu.tests(backend, 60, "--collect-only")
    options = [word for word in stage.command[3:] if word not in ("--timeout", "60")]
    environment = (
        os.environ
        | stage.environment
        | HERE
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", gpu_runner.ANSWER: str(tmp_path / "answer")}
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result, cut = gpu_runner.answers(tmp_path / "answer")
    assert not cut and result["collected"] == result["expected"] >= stage.least_tests
    assert (
        f"[{backend}" in done.stdout
        and {"cuda": "[triton", "triton": "[cuda"}[backend] not in done.stdout
    )


def test_a_worker_that_crashes_in_the_last_test_has_run_it(monkeypatch):
    """Of such a test pytest-xdist reports the failure, and no end."""
    answered = []
    monkeypatch.setattr(gpu_pytest, "answer", lambda said: answered.append(dict(said)))
    gpu_pytest.Count().pytest_runtest_logreport(
        pytest.TestReport("test", ("", None, ""), {}, "failed", "crashed", "???")
    )
    assert answered[-1]["failed"] == ["test"]


def test_tests_that_are_skipped_or_left_out_are_missed(tmp_path):
    """The plugin counts what ran; what was excused counts too."""
    (tmp_path / "conftest.py").write_text(
        "def pytest_collection_modifyitems(config, items):\n    items[:] = [item for item in items "
        "if 'left_out' not in item.name]\n"
    )
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('kernels', ['cuda', 'triton'])\n"
        "@pytest.mark.parametrize('what', ['passes', 'fails', 'skips', 'excused', 'left_out'])\n"
        "def test(kernels, what):\n"
        "    assert what != 'fails'\n"
        "    what == 'skips' and pytest.skip('no reason')\n"
        "    what == 'excused' and pytest.skip('the GPU has too little memory')\n"
        "def test_of_no_backend():\n    pass\n"
    )
    for backend, more in (("cuda", 0), ("triton", 1)):
        file = tmp_path / f"{backend}.jsonl"
        environment = os.environ | {
            "GPU_TESTS": backend,
            gpu_runner.ANSWER: str(file),
            "PYTHONPATH": str(ROOT),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "bench.gpu_pytest",
            "-p",
            "no:cacheprovider",
            str(tmp_path),
        ]
        assert (
            subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode
            == 1
        )
        result, cut = gpu_runner.answers(file)
        assert not cut and (result["expected"], result["passed"], result["excused"]) == (
            5 + more,
            1 + more,
            1,
        )
        assert [name.split("::")[-1] for name in result["failed"]] == [f"test[fails-{backend}]"]
        assert len(result["skipped"]) == 1 and "no reason" in result["skipped"][0]
        stop = gpu_runner.too_few(
            stand_in("tests", "", least_tests=1), {"status": "failed", "result": result}
        )
        assert (
            stop.status == 5
            and (f"{3 + more} of {5 + more} tests ran; skipped: test[skips-{backend}]")
            in stop.reason
        )


# ---- The cases, on the CPU


@pytest.mark.parametrize("case", gpu_stages.CASES)
def test_a_case_runs_on_the_cpu_at_a_small_size(monkeypatch, capsys, case):
    monkeypatch.setattr(
        machine,
        "launches",
        lambda *_: pytest.fail("the profiler starts too slowly for a case of twelve seconds"),
    )
    answered = {}
    monkeypatch.setattr(gpu_stages, "answer", answered.update)
    assert gpu_stages.main([case, "--device", "cpu", "--small", "--seconds", "0"]) == 0
    assert answered["backend"] in ("auto", "cpp", "triton", "reference")
    if case.startswith("bench"):
        assert answered["contestants"][0]["samples"] >= 2 and json.dumps(answered, allow_nan=False)


def test_the_probe_knows_triton_by_any_name_and_waits_for_no_driver(monkeypatch):
    def version(name):
        if name != "pytorch-triton-rocm":
            raise importlib.metadata.PackageNotFoundError
        return "3.6.0"

    monkeypatch.setattr(gpu_stages.importlib.metadata, "version", version)
    assert gpu_stages.triton_version() == "3.6.0"

    def hangs(*_, timeout, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_stages.subprocess, "run", hangs)
    assert gpu_stages.driver() is None


def test_a_case_that_is_wrong_fails_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_stages.uk,
        "selection_mask",
        lambda g, *, backend, **_: g > (0 if backend == "reference" else 0.1),
    )
    assert gpu_stages.main(["smoke-mask", "--device", "cpu", "--small"]) == 1
    assert re.search(
        r"ours is wrong: \d+ of 4096 elements are selected "
        r"otherwise",
        capsys.readouterr().out,
    )


def test_a_case_for_another_backend_than_the_one_in_use_is_not_run(monkeypatch, capsys):
    monkeypatch.setattr(machine, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_stages.backends, "why_not", lambda *_: None)
    monkeypatch.setattr(gpu_stages.backends, "choose", lambda *_: "triton")
    monkeypatch.setitem(gpu_stages.CASES, "smoke-mask", lambda at: pytest.fail("it was run"))
    assert gpu_stages.main(["smoke-mask"]) == 4
    assert "cuda was to be measured, and the backend in use is triton" in capsys.readouterr().out
    monkeypatch.setattr(gpu_stages.backends, "why_not", lambda *_: "no library")
    assert gpu_stages.main(["smoke-mask", "--backend", "triton"]) == 4
    assert "triton was to be measured and cannot be: no library" in capsys.readouterr().out


def test_the_drivers_structures_are_as_in_cuda_h():
    launch, attribute = gpu_clusters.Launch, gpu_clusters.Attribute
    fields = (launch.shared, launch.stream, launch.attributes, launch.count)
    assert (ctypes.sizeof(launch), *(field.offset for field in fields)) == (56, 24, 32, 40, 48)
    assert (ctypes.sizeof(attribute), attribute.cluster.offset) == (72, 8)


def test_the_empty_kernel_is_one(tmp_path):
    if not shutil.which("ptxas"):
        pytest.skip("ptxas, which comes with the CUDA toolkit, is not installed")
    (tmp_path / "nothing.ptx").write_bytes(gpu_clusters.PTX.rstrip(b"\0"))
    subprocess.run(
        ["ptxas", "-arch=sm_90", "nothing.ptx", "-o", "nothing.cubin"], cwd=tmp_path, check=True
    )


# ---- The timer


class Queue:
    """Feigns a GPU's queue, with a clock: steps take a second there, and the host a hundredth."""

    def __init__(self, monkeypatch):
        self.calls, self.clock = [], 0.0
        monkeypatch.setattr(
            torch.cuda, "_sleep", lambda cycles: self.calls.append(("pause", cycles / timer.CLOCK))
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(timer, "other_data", lambda device: self)

    def sum(self):
        self.calls.append("other data")

    def record(self):
        self.calls.append("event")

    def synchronize(self):
        self.calls.append("wait")

    def elapsed_time(self, end):
        return 1000.0

    def step(self):
        self.calls.append("step")
        self.clock += 0.01


def test_a_step_on_a_gpu_waits_in_the_queue_until_the_host_is_through(monkeypatch):
    queue = Queue(monkeypatch)
    assert timer.sample(queue.step, 2, "cuda") == 1.0
    # ten times the host's part
    pause = ("pause", pytest.approx(0.1))
    assert (
        queue.calls
        == ["wait", "step", "wait", pause, "other data", "event", "step", "event", "wait"] * 2
    )
    queue.calls.clear()
    timer.sample(lambda: None, 1, "cuda")
    assert ("pause", pytest.approx(timer.SHORTEST_PAUSE)) in queue.calls


def test_by_hand_a_case_answers_on_the_terminal(monkeypatch, capsys):
    monkeypatch.delenv(gpu_runner.ANSWER, raising=False)
    answer({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_the_process_that_watches_over_the_stages_imports_no_torch():
    code = "import sys, bench.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
