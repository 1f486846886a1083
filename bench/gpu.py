"""Runs `python -m bench.gpu`: builds where needed, then tests and times what needs a GPU, in eight
minutes; docs/gpu.md is its manual.

This process never touches the GPU and imports no torch: each stage is a process of its own
(gpu_runner.py, gpu_stages.py).
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import sys
import tempfile
import time

from . import gpu_report
from .gpu_runner import (
    ROOT,
    WRONG_BACKEND,
    Output,
    Stage,
    Stop,
    Wave,
    alone,
    asked_to_stop,
    run,
    too_few,
)

# exit statuses; WRONG_BACKEND and TOO_FEW_TESTS are the runner's, 130 is Ctrl-C
OK, FAILED, ARGUMENTS, NO_GPU = 0, 1, 2, 3
# seconds for all but a build
BUDGET = 480.0
# seconds that a build on the spot adds
BUILD = 120.0
# seconds kept for the table and the picture
CLOSING = 8.0
# seconds of a benchmark case, its process's start included
CASE = 12.0
# seconds that a probe takes where the limits are right, and by which one that takes longer raises
# them at most
START, MOST = 8.0, 10.0
# that python_tests/test_gpu.py has at least for each backend
TESTS = {"cuda": 40, "triton": 40}

SMOKE = (
    "clusters",
    "mask",
    "step",
    "previous",
    "bfloat16",
    "rank",
    "loss-10",
    "loss-2000",
    "loss-32000",
    "loss-128256",
    "fgm",
    "pgd",
    "dropout",
    "graph",
    "capture",
)
# launches are not blocking there: a capture runs nothing that one could wait for
GRAPHS = ("graph", "capture")
MAIN = ("step", "previous", "bfloat16", "1e9", "loss-32000", "loss-128256", "dropout", "fgm")
MORE = ("loss-32000-float32", "loss-128256-float32", "dropout-float32")
COMPILED = ("loss-32000", "loss-128256")
TRITON = ("step", "loss-32000", "sweep")
# What to do where one of the two cannot be measured.
ALONE = {
    "cuda": "; --stages tests-triton,triton measures Triton alone",
    "triton": "; --stages smoke,tests-cuda,bench,check,profile,compile,compiled measures CUDA "
    "alone",
}


COMPILED_KERNELS = {"TRITON_INTERPRET": "0"}


def case(
    name: str,
    limit: float,
    *options: str,
    of: str = "",
    backend: str | None = "cuda",
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    program: str | None = None,
) -> Stage:
    """Returns the stage of a case of gpu_stages.py: the one of the stage's name, or `of`. before: a
    program that runs it.
    """
    command = (*before, sys.executable, "-m", "bench.gpu_stages", of or name, *options)
    return Stage(
        name, command, limit, COMPILED_KERNELS | (environment or {}), backend, program=program
    )


def bench(
    kind: str, name: str, *options: str, backend: str = "cuda", limit: float = CASE, **more
) -> Wave:
    return alone(
        case(
            f"{kind}-{name}",
            limit,
            "--backend",
            backend,
            *options,
            of=f"bench-{name}",
            backend=backend,
            **more,
        )
    )


def tests(backend: str, limit: float, *options: str) -> Stage:
    """Returns the tests of test_gpu.py for one backend, in parallel where pytest-xdist is there,
    each with a limit where pytest-timeout is.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.gpu_pytest",
        "-p",
        "no:cacheprovider",
        "--long",
        *options,
    ]
    if importlib.util.find_spec("xdist") and "--collect-only" not in options:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    environment = COMPILED_KERNELS | {"GPU_TESTS": backend}
    return Stage(
        f"tests-{backend}",
        (*command, "python_tests/test_gpu.py"),
        limit,
        environment,
        backend,
        TESTS[backend],
    )


def plan() -> list[Wave]:
    """Returns everything after the probe: correctness before speed, small before large, CUDA before
    Triton, the sanitizers and compilers late.
    """
    one_at_a_time = {"CUDA_LAUNCH_BLOCKING": "1"}
    # each tensor's end is seen, not its pool's
    no_pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Not among the sources, which may be read only.
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(
            pathlib.Path(tempfile.gettempdir(), f"uegr-gpu-compiled-{os.getuid()}")
        )
    }

    def sanitizer(tool: str) -> Stage:
        before = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        return case(
            f"check-{tool}",
            68,
            of="sanitized",
            before=before,
            environment=no_pool,
            program=before[0],
        )

    sections = [
        word
        for name in ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats")
        for word in ("--section", name)
    ]
    ncu = (
        "ncu",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--launch-count",
        "12",
        *sections,
    )
    profiles = (
        case("profile", 15),
        case("profile-ncu", 25, "--counters", of="profile", before=ncu, program="ncu"),
    )
    compiling = [
        case(
            f"compile-{name}",
            34,
            "--compile-alone",
            of=f"bench-{name}",
            environment=cache,
            backend=None,
        )
        for name in COMPILED
    ]
    return [
        Wave(
            tuple(
                case(f"smoke-{name}", 25, environment={} if name in GRAPHS else one_at_a_time)
                for name in SMOKE
            ),
            43,
            at_once=4,
        ),
        alone(tests("cuda", 68)),
        *(bench("bench", name) for name in (*MAIN, *MORE)),
        Wave((sanitizer("memcheck"), sanitizer("racecheck"), tests("triton", 68)), 68, at_once=3),
        Wave(profiles, 26),
        Wave(tuple(compiling), 34, at_once=len(compiling)),
        *(bench("compiled", name, "--compiled", limit=16, environment=cache) for name in COMPILED),
        *(bench("triton", name, backend="triton", limit=14) for name in TRITON),
    ]


PROBE = case("probe", 25, backend=None)


def dry_plan() -> list[Wave]:
    """Returns what needs no GPU: every test collected, every case built and run at a small size on
    the CPU.
    """
    collecting = [tests(backend, 120, "--collect-only") for backend in TESTS]
    collecting = [
        dataclasses.replace(stage, name=f"collect-{stage.backend}", backend=None)
        for stage in collecting
    ]
    return [
        *map(alone, collecting),
        alone(case("all", 300, "--device", "cpu", "--small", backend=None)),
    ]


def builder(limit: float) -> Stage:
    """Ends before anything imports the package: what is imported first finds the library."""
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return Stage(
        "build", command, limit, {"UEGR_KERNELS_BUILD": "1", "UEGR_KERNELS_CUDA": "1"}, silent=True
    )


def chosen(waves: list[Wave], wanted: str) -> list[Wave]:
    """Returns the stages named, by their whole name or by its first word; ValueError for a name
    that is none.
    """
    names = [stage.name for wave in waves for stage in wave.stages]
    known = {*names, *(name.split("-")[0] for name in names), "probe"}
    asked = [name.strip() for name in wanted.split(",") if name.strip()]
    if not asked:
        raise ValueError("--stages names no stage; leave it out for all of them")
    if unknown := [name for name in asked if name not in known]:
        firsts = dict.fromkeys(name.split("-")[0] for name in names)
        raise ValueError(
            f"--stages has {', '.join(unknown)}; there are {', '.join(firsts)}, or of "
            f"these one by one {', '.join(names)}"
        )
    found = []
    for wave in waves:
        stages = tuple(
            stage
            for stage in wave.stages
            if stage.name in asked or stage.name.split("-")[0] in asked
        )
        found += [dataclasses.replace(wave, stages=stages)] if stages else []
    return found


def raised(waves: list[Wave], probed: float) -> list[Wave]:
    """Returns the limits for a machine on which processes start slowly: its probe took so many
    seconds. The budget stays.
    """
    more = min(max(0.0, probed - START), MOST)
    found = []
    for wave in waves:
        stages = tuple(
            dataclasses.replace(stage, limit=stage.limit + more) for stage in wave.stages
        )
        found.append(
            dataclasses.replace(
                wave, stages=stages, limit=wave.limit + more * math.ceil(len(stages) / wave.at_once)
            )
        )
    return found


def judge_probe(record: dict, asked: list[str], dry_run: bool) -> Stop | None:
    """Judges whether there is a GPU, and whether calls of the package there would be served by the
    backends that are to be measured.
    """
    result = record.get("result", {})
    if record["status"] != "passed" and "no_gpu" not in result:
        other = (
            (f"; start bench.gpu with a Python that has it, not with {sys.executable}")
            if "No module named" in record["message"]
            else ""
        )
        return Stop(NO_GPU, f"the probe came to no answer ({record['message']}){other}")
    if result["no_gpu"] and not dry_run:
        return Stop(NO_GPU, f"No GPU was found: {result['no_gpu']}")
    for backend in asked:
        if reason := result["backends"][backend]:
            return Stop(
                WRONG_BACKEND,
                f"{backend} was to be measured and cannot be: {reason}{ALONE[backend]}",
            )
    if not dry_run and "cuda" in asked and result["backends"]["auto"] != "cuda":
        return Stop(
            WRONG_BACKEND,
            f"cuda was to be measured, and the backend in use is {result['backends']['auto']}",
        )
    return None


def judge(stage: Stage, record: dict) -> Stop | None:
    """Judges every other stage."""
    found = record.get("result", {}).get("backend")
    # pytest's own exit status 4 means something else, and another program's anything.
    ours = stage.least_tests is None and stage.program is None
    if (ours and record.get("exit") == WRONG_BACKEND) or (
        stage.backend and found and found != stage.backend
    ):
        words = record.get(
            "message",
            f"{stage.name} was to measure {stage.backend}, and the backend in use is {found}",
        )
        return Stop(WRONG_BACKEND, words)
    return too_few(stage, record)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Tests and times everything that needs a GPU. Exit status: 0; 1 where "
        "something failed; 2 for wrong arguments; "
        "3 without a GPU; 4 where the backend in use is not the one to be measured; 5 where too "
        "few tests ran; 130 for Ctrl-C.",
    )
    default = ROOT / "build" / "gpu"
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=pathlib.Path,
        default=default,
        help="for at most six files; default: build/gpu",
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help=f"the last stages fall beyond; default {BUDGET:.0f} and a build",
    )
    parser.add_argument(
        "--stages",
        metavar="LIST",
        help="these alone, by commas, after the probe: smoke,tests-cuda,bench-step",
    )
    parser.add_argument(
        "--build-only",
        action="store_true",
        help="build, see whether the library loads, and end; needs no GPU",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build, load, collect the tests, run every case on the CPU; needs no GPU",
    )
    options = parser.parse_args(arguments)
    # the start takes a moment too
    least = PROBE.limit + CLOSING + 1
    if options.budget is not None and not least <= options.budget < math.inf:
        parser.error(
            f"--budget {options.budget:g} is too little for the probe; give {least:.0f} "
            "seconds or more"
        )
    if options.build_only and (options.dry_run or options.stages is not None):
        parser.error("--build-only takes no --dry-run and no --stages: it runs no stage")
    try:
        options.waves = plan() if options.stages is None else chosen(plan(), options.stages)
        options.output = Output(options.output)
        options.claim = contextlib.ExitStack()
        options.claim.enter_context(options.output.claimed())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status that --help names."""
    options = parsed(sys.argv[1:] if arguments is None else arguments)
    output: Output = options.output
    status = 130
    with options.claim, asked_to_stop():
        try:
            status = work(options, output)
        except KeyboardInterrupt:
            output.keep({"stage": "end", "status": "stopped", "message": "Ctrl-C or SIGTERM"})
        gpu_report.say(gpu_report.close(output, status))
    return status


def work(options: argparse.Namespace, output: Output) -> int:
    began = time.monotonic()
    until = began + (options.budget or BUDGET) - CLOSING
    without_gpu = options.dry_run or options.build_only
    if without_gpu and options.budget is None:
        until = began + 3600
    asked = list(
        dict.fromkeys(
            stage.backend for wave in options.waves for stage in wave.stages if stage.backend
        )
    )
    asked = ["cuda"] if without_gpu else asked
    found: dict = {}

    def probe(again: str) -> Stop | None:
        """Runs the probe; its record is judged, what it found stays."""
        stage = dataclasses.replace(
            PROBE,
            name=f"probe{again}",
            command=(*PROBE.command, "--no-gpu") if without_gpu else PROBE.command,
        )
        records: list[dict] = []
        fell = run(
            [alone(stage)], output, until, lambda _, record: records.append(record), gpu_report.show
        )
        found.update(records[0].get("result", {}) if records else {})
        return fell or judge_probe(
            records[0] if records else output.records[-1], asked, without_gpu
        )

    stop = None if options.build_only else probe("")
    # a first import from a cold disk can take that long
    if stop and not found and output.records[-1]["status"] == "killed":
        stop = probe("-again")
    buildable = (
        found.get("cuda") and found.get("nvcc") and "cuda" in asked and found["backends"]["cuda"]
    )
    if options.build_only or (stop and stop.status == WRONG_BACKEND and buildable):
        limit = 1800.0 if without_gpu else BUILD
        until += 0 if options.budget else BUILD
        run([alone(building(limit, found))], output, until, lambda *_: None, gpu_report.show)
        stop = probe("-after-build")
    if stop is None and not options.build_only:
        probed = [
            record.get("seconds", 0.0)
            for record in output.records
            if record["stage"].startswith("probe")
        ][-1]
        stop = run(
            dry_plan() if options.dry_run else raised(options.waves, probed),
            output,
            until,
            judge,
            gpu_report.show,
        )
    if options.dry_run and stop is None:
        for stage in (stage for wave in options.waves for stage in wave.stages):
            command = " ".join(
                ["python3" if word == sys.executable else word for word in stage.command]
            )
            record = {
                "stage": stage.name,
                "status": "would run",
                "message": command,
                "limit": stage.limit,
            }
            output.keep(record)
            gpu_report.show(record)
    if stop is not None:
        output.keep({"stage": "end", "status": "stopped", "message": stop.reason})
        return stop.status
    bad = [
        record
        for record in output.records
        if record["status"] in ("failed", "crashed", "killed") and record["stage"] != "probe"
    ]
    return FAILED if bad else OK


def building(limit: float, found: dict) -> Stage:
    """Builds for this machine's own GPU alone, where there is one and no other is named."""
    stage = builder(limit)
    own = (
        {"TORCH_CUDA_ARCH_LIST": found["capability"]}
        if found.get("capability") and "TORCH_CUDA_ARCH_LIST" not in os.environ
        else {}
    )
    return dataclasses.replace(stage, environment=stage.environment | own)


if __name__ == "__main__":
    sys.exit(main())
