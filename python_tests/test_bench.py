"""The benchmarks' machinery: suites, what they write, the documents' figures. No time is judged."""

import json
import math
import os
import re
import shutil
import subprocess

import pytest
import torch

from bench import __main__ as bench
from bench import (
    cost_and_gain,
    cuda_code,
    gpu_model,
    harness,
    machine,
    pages,
    peers,
    shapes,
    sharded_model,
    tables,
    timer,
)

README = harness.ROOT / "bench" / "README.md"


def documented() -> dict[str, str]:
    """Gives the keys in bench/README.md's table, and where they are found."""
    rows = re.findall(
        r"^\| (`[^|]+) \| ([^|]+) "
        r"\|",
        README.read_text().split("| key |")[1].split("\n\n")[0],
        re.MULTILINE,
    )
    return {key: where for keys, where in rows for key in re.findall(r"`([^`]+)`", keys)}


def unlike_documented(line: dict, known: dict[str, str], needed: tuple[str, ...]) -> list[str]:
    """Gives keys that bench/README.md does not have, and those it promises that the line lacks."""
    wrong = [f"{key} is not documented" for key in line if key not in known]
    wrong += [
        f"{key} is missing"
        for key, where in known.items()
        if where in needed and key[0] != "." and key not in line
    ]
    for one in line.get("contestants", []):
        wrong += [f".{key} is not documented" for key in one if f".{key}" not in known]
        parts = ("all", "those not run") if "missing" in one else ("all", "the rest")
        for key, where in known.items():
            if (
                key[0] == "."
                and (where == "all" or (where in parts and where in needed))
                and key[1:] not in one
            ):
                wrong.append(f"{key} is missing of {one['name']}")
    return wrong


def ran(*arguments: str) -> int:
    return bench.main([*arguments, "--threads", "1", "--rounds", "2"])


# ---- Suites

# a case of each that takes seconds, and which peers to leave out
QUICK = {
    "selective": ("600 tensors of 64: previous", "plain"),
    "divergence": ("UEGR loss, m = 2, N = 16, C = 2", "compile"),
    "perturbation": ("FGM", "compile"),
    "dropout": ("small", "compile"),
    "bistage": ("m = 2", "plain"),
    "host": ("previous", "compile"),
    "scaling": ("1,000 elements in one tensor, 1 thread", "compile"),
}


def test_without_arguments_the_suites_are_listed(capsys):
    assert bench.main([]) == 0
    listed = capsys.readouterr().out
    assert set(QUICK) == set(bench.SUITES)
    for suite in QUICK:
        assert re.search(rf"^  {suite} +[A-Z].*\.$", listed, re.MULTILINE), suite


@pytest.mark.parametrize(
    "suite", [pytest.param(name, marks=[pytest.mark.long] * (name != "host")) for name in QUICK]
)
def test_a_suite_writes_json_as_documented_and_a_table(tmp_path, monkeypatch, capsys, suite):
    if suite == "host":
        pytest.importorskip("triton", exc_type=ImportError)
    # the host's suite sets it
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    only, without = QUICK[suite]
    assert (
        ran(suite, "--quick", "--output", str(tmp_path), "--only", only, "--without", without) == 0
    )
    printed = capsys.readouterr().out
    lines = harness.read(tmp_path / f"{suite}-cpu.jsonl")
    assert lines
    for line in lines:
        assert (
            unlike_documented(line, documented(), ("all", "measured", "the rest", "those not run"))
            == []
        )
        assert line["suite"] == suite and line["device"] == "cpu" and only in line["case"]
        ours = line["contestants"][0]
        assert ours["name"] == "uegr_kernels" and ours["launches"] >= 1 and ours["samples"] >= 2
        assert all("missing" in one for one in line["contestants"] if without in one["name"])
    table = (tmp_path / f"{suite}-cpu.md").read_text()
    assert lines[0]["case"] in table and lines[0]["case"] in printed
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert pictures in ([f"{suite}-cpu.png"], [])
    assert bool(pictures) == bool(bench.plot.importlib.util.find_spec("matplotlib"))


def test_several_suites_run_one_after_another(monkeypatch):
    ended = {"dropout": 1, "host": 0, "scaling": 130}
    started = []

    def run(options, command):
        started.append(command)
        if ended[options.command] == 130:
            raise KeyboardInterrupt
        return ended[options.command]

    monkeypatch.setattr(bench, "run", run)
    assert bench.main(["dropout", "host", "dropout", "--quick"]) == 1
    assert started == ["python -m bench dropout --quick", "python -m bench host --quick"]
    started.clear()
    assert bench.main(["scaling", "host", "--quick"]) == 130
    assert started == ["python -m bench scaling --quick"]


def test_wrong_arguments_are_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(["nonsense"])
    assert error.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        bench.main(["selective", "--device", "tpu"])
    assert error.value.code == 2
    assert "invalid choice: 'tpu'" in capsys.readouterr().err
    assert ran("dropout", "--quick", "--output", str(tmp_path), "--only", "nothing") == 2
    assert "--only 'nothing' matches none of: small" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said(tmp_path, capsys):
    assert ran("selective", "--quick", "--device", "cuda", "--output", str(tmp_path / "new")) == 2
    assert re.search(
        r"--device cuda needs a GPU: .*; .*; or use --device "
        r"cpu",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "new").exists()


# ---- One case


def some_case(**changes) -> harness.Case:
    x = torch.ones(1000)

    def fails() -> None:
        raise RuntimeError("needs a GPU\nand more")

    def contestants() -> list[harness.Contestant]:
        return [
            harness.Contestant("uegr_kernels", lambda: x + x, 12_000),
            harness.Contestant("slow", lambda: x.sum() + x, rounds=1),
            harness.Contestant("fails", fails, may_fail=True),
            harness.Contestant("large", lambda: x, memory=10**18),
            harness.Contestant("absent", None, missing="it is not installed"),
        ]

    facts = {
        "case": "some",
        "facts": {},
        "memory": 8000,
        "verify": lambda: None,
        "contestants": contestants,
    }
    facts["name"] = facts.pop("case")
    return harness.Case(**(facts | changes))


def measured(case: harness.Case) -> dict:
    return harness.measure(case, 3, machine.Copy(2**20), lambda: None)


def test_peers_that_cannot_run_are_named_with_the_reason():
    line = measured(some_case())
    found = {one["name"]: one for one in line["contestants"]}
    assert found["uegr_kernels"]["launches"] == 1 and found["slow"]["launches"] == 2
    # beside "slow" once, then alone
    assert found["uegr_kernels"]["samples"] == 3 and found["slow"]["samples"] == 1
    assert found["fails"] == {"name": "fails", "missing": "RuntimeError: needs a GPU"}
    assert found["absent"] == {"name": "absent", "missing": "it is not installed"}
    assert found["large"]["missing"].startswith("takes 1000000000.0 GB beside the tensors")
    for text in (tables.results([line]), tables.missing([line])):
        for reason in ("needs a GPU", "it is not installed", "takes 1000000000.0 GB"):
            assert reason in text
    assert "slow" not in tables.missing([line])


def test_a_case_too_large_is_listed_with_its_size():
    line = measured(some_case(memory=10**15))
    assert (
        line["skipped"] == ("needs 1000000.0 GB, more than 80% of what is free")
        and "contestants" not in line
    )
    assert "skipped: needs 1000000.0 GB" in tables.results([line])
    assert "some (needs 1000000.0 GB" in tables.missing([line])


def test_a_case_that_is_wrong_has_no_figures():
    line = measured(some_case(verify=lambda: "3 of 4 elements"))
    assert (
        line["error"] == ("ours and the reference disagree: 3 of 4 elements")
        and "contestants" not in line
    )
    assert "3 of 4 elements" in tables.results([line])


def test_threads_of_a_case_are_its_own():
    seen, before = [], torch.get_num_threads()
    one = harness.Contestant("uegr_kernels", lambda: seen.append(torch.get_num_threads()))
    measured(some_case(contestants=lambda: [one], threads=before + 1))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_launches_are_operators_that_nobody_else_calls():
    x = torch.ones(5, 5)
    assert machine.launches(lambda: torch.nn.functional.linear(x, x).sum()) == 2
    assert machine.launches(lambda: None) == 0


def test_memory_of_a_step_is_seen():
    extra = machine.peak_extra(lambda: torch.ones(2**24))
    assert extra is None or 2**25 < extra < 2**28


# ---- A quiet machine


@pytest.fixture
def clock(monkeypatch):
    """Gives a machine whose others and time a test says: the seconds slept, and what others use."""
    state = {"slept": 0.0, "others": lambda slept: 0.0}

    def sleep(seconds):
        state["slept"] += seconds

    def looked(seconds=machine.LOOK):
        sleep(seconds)
        return state["others"](state["slept"])

    monkeypatch.setattr(machine.time, "sleep", sleep)
    monkeypatch.setattr(machine.time, "monotonic", lambda: state["slept"])
    monkeypatch.setattr(machine, "others_cpus", looked)
    return state


def test_a_busy_machine_is_waited_for_and_no_longer_than_allowed(clock, capsys):
    assert machine.wait_until_quiet(600) is None and clock["slept"] < 3
    clock["others"] = lambda slept: 1.5 if slept < 100 else 0.1
    assert machine.wait_until_quiet(600) is None and 100 <= clock["slept"] < 110
    assert "other programs use 1.50 processors: waiting up to 600 s" in capsys.readouterr().err
    clock["others"] = lambda slept: 1.5
    began = clock["slept"]
    assert "the machine is busy (other programs use 1.50" in machine.wait_until_quiet(60)
    assert 60 <= clock["slept"] - began < 65
    # where it cannot be known
    clock["others"] = lambda slept: None
    assert machine.wait_until_quiet(0) is None


def test_a_case_that_others_came_into_is_repeated_and_given_up(clock):
    found = [{"others_cpus": each} for each in (0.9, 0.3, 0.9, 0.9, 0.05, *[0.9] * 5)]
    patience = bench.Patience(10)
    assert patience.quiet(lambda: found.pop(0)) == {"others_cpus": 0.05} and len(found) == 5
    assert patience.quiet(lambda: found.pop(0)) is None and not found
    assert patience.quiet(lambda: {"skipped": "too large"}) == {"skipped": "too large"}
    clock["others"] = lambda slept: 1.0
    assert patience.quiet(lambda: pytest.fail("measured on a busy machine")) is None
    assert patience.left == 0


def test_a_process_of_ours_that_has_ended_is_no_other_program(monkeypatch):
    if machine.others_seconds() is None:
        pytest.skip("this system has no /proc/stat")
    monkeypatch.setattr(machine.os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    before = machine.others_seconds()
    # user, system, and of ended children
    monkeypatch.setattr(machine.os, "times", lambda: (1e3, 2e3, 4e3, 8e3, 0.0))
    assert before - machine.others_seconds() == pytest.approx(15e3, abs=100)


def test_a_busy_machine_keeps_the_old_row_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "wait_until_quiet", lambda seconds: "busy")
    monkeypatch.setattr(bench.importlib, "import_module", lambda *_: suite)
    suite = type("Suite", (), {"cases": staticmethod(lambda *_: [some_case()])})
    old = {"case": "some", "suite": "host", "others_cpus": 0.0}
    file = tmp_path / "host-cpu.jsonl"
    file.write_text(json.dumps(old) + "\n")
    assert ran("host", "--output", str(tmp_path)) == 0
    assert harness.read(file) == [old] and not file.with_suffix(".md").exists()
    said = capsys.readouterr()
    assert "some: the machine was busy; what there was of it stays" in said.err
    assert "python -m bench host --only some" in said.err and "Written" not in said.out


# ---- The timer


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ours_takes_its_turn_beside_each_peer(monkeypatch, device):
    """The same rounds on both devices; a peer of few rounds leaves ours to the others."""
    seen = []
    seconds = {"ours": 2.0, "b": 1.0, "c": 4.0}

    def sampled(step, repeats, where):
        assert where == device
        seen.append(step())
        return seconds[seen[-1]]

    monkeypatch.setattr(timer, "sample", sampled)
    variants = {name: timer.Variant(lambda name=name: name) for name in ("ours", "b")}
    variants["c"] = timer.Variant(lambda: "c", rounds=1)
    times = timer.alternated(variants, 3, device)
    assert "".join(name[0] for name in seen) == "oboc" + "ob" + "ob"
    assert times["b"].ratios == [2.0] * 3 and times["c"].ratios == [0.5]
    assert len(times["ours"].seconds) == 4 and not times["ours"].ratios
    seen.clear()
    assert timer.in_turn({name: variants[name].step for name in "bc"}, 2, device) == {
        "b": [1.0, 1.0],
        "c": [4.0, 4.0],
    }
    # beside the warm-up
    assert seen == ["b", "c"] * 2


def test_no_round_begins_after_the_end_but_the_first_three():
    variants = {name: timer.Variant(lambda: None) for name in "ab"}
    times = timer.alternated(variants, 9, "cpu", until=0.0)
    assert len(times["a"].seconds) == timer.FEWEST


def test_a_spread_is_the_median_with_its_quartiles():
    assert timer.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert timer.spread([0.123456789]) == {"median": 0.123457, "q1": 0.123457, "q3": 0.123457}


# ---- What is timed


def test_models_have_their_published_sizes():
    sizes = {name: sum(map(math.prod, tensors)) for name, tensors in shapes.MODELS.items()}
    assert sizes["BERT-base"] == 109_483_778 and len(shapes.MODELS["BERT-base"]) == 201
    assert sizes["BERT-large"] == 335_143_938 and sizes["RoBERTa-large"] == 355_361_794
    assert sizes["1 B decoder"] == 1_235_814_400 and sizes["7 B decoder"] == 6_738_415_616
    assert shapes.SMALL_COUNTS == (10_000, 5_000, 20_000)
    assert (shapes.SIZES[0], shapes.SIZES[-1]) == (10**3, 10**9)


def test_every_suite_says_what_it_would_time():
    """Their full cases are built without their tensors."""
    found = {
        name: bench.importlib.import_module(f"bench.bench_{name}").cases(False, "cpu")
        for name in QUICK
        if name != "host"
    }
    for suite, cases in found.items():
        assert len({case.name for case in cases}) == len(cases), suite
        for case in cases:
            assert unlike_documented({"suite": suite, **case.facts}, documented(), ()) == []
    selective = {case.name: case for case in found["selective"]}
    for name in (*shapes.MODELS, "10,000 tensors of 64"):
        assert f"{name}: defaults (min-max)" in selective
    assert selective["7 B decoder: defaults (min-max)"].memory == 16 * 6_738_415_616
    losses = {
        (case.facts["m"], case.facts["C"])
        for case in found["divergence"]
        if case.name.startswith("UEGR")
    }
    assert losses == {(m, c) for m in (2, 3, 4, 5) for c in (2, 1_000, 32_000, 128_256)}
    for suite in ("selective", "divergence", "perturbation", "dropout"):
        assert {case.facts["dtype"] for case in found[suite]} == {"float32", "bfloat16"}
    assert {
        case.facts["elements"] for case in found["scaling"] if case.facts["axis"] == "one tensor"
    } == set(shapes.SIZES)


def test_the_step_in_five_passes_leaves_gradients_alone():
    torch.manual_seed(0)
    params = [torch.zeros(1000), torch.zeros(3, 5)]
    for p in params:
        p.grad = torch.linspace(0, 1, p.numel()).view(p.shape)
    kept = [p.grad.clone() for p in params]
    step = peers.five_passes(
        params, lambda twins: torch.optim.AdamW(twins, 1.0), ranked=True, salient=True
    )
    step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, kept, strict=True))
    # about 1 - threshold of them are selected
    assert 0.1 < (params[0] != 0).float().mean() < 0.4
    assert (params[0][900:] != 0).float().mean() > 0.6 and not params[0][:300].any()
    one, other = peers.ranks([torch.tensor([3.0, 1.0]), torch.tensor([2.0])])
    assert one.tolist() == [1.0, 0.0] and other.tolist() == [0.5]


# ---- Documents


def test_the_documents_agree_with_the_results(capsys):
    assert bench.main(["docs", "--check"]) == 0, capsys.readouterr()
    made = {block.name: block.make() for block in pages.BLOCKS}
    # of the pre-trained model no method may have all its runs yet
    assert {name for name, text in made.items() if len(text) < 500} <= {"pretrained"}
    assert all(made.values())


def test_a_picture_of_other_results_is_found_out(tmp_path):
    pytest.importorskip("matplotlib")
    for file in (cost_and_gain.COST[0], cost_and_gain.GAINS):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((pages.RESULTS / file).read_bytes())
    assert cost_and_gain.agrees(tmp_path, pages.PICTURE)
    assert not cost_and_gain.agrees(tmp_path, tmp_path / "none.png")
    gains = tmp_path / cost_and_gain.GAINS
    gains.write_text(gains.read_text().replace(" 5.9 ± 1.5 ", " 9.9 ± 1.5 "))
    assert not cost_and_gain.agrees(tmp_path, pages.PICTURE)


def test_what_was_not_measured_in_quiet_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    made = pages.figures()
    for suite, (cases, _) in pages.HEADLINES.items():
        assert f"{'; '.join(cases)}. `python -m bench {suite}` measures them." in made
    assert "cuda" not in made


def test_a_block_is_replaced_and_nothing_else(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(
        "before\n<!-- some: generated by python -m bench docs -->\nold\n<!-- end of "
        "some -->\nafter\n"
    )
    block = pages.Block(file, "some", lambda: "a \\1 table")
    assert pages.update(True, [block]) == 1 and "old" in file.read_text()
    assert pages.update(False, [block]) == 0
    assert file.read_text() == (
        "before\n<!-- some: generated by python -m bench docs -->\n\na \\1 table\n\n<!-- end of "
        "some -->\nafter\n"
    )
    assert pages.update(True, [block]) == 0
    assert pages.update(False, [pages.Block(file, "other", lambda: "")]) == 1
    assert "has 0 blocks named other, not one" in capsys.readouterr().err


def test_committed_results_have_documented_keys():
    known = documented()
    lines = [
        (path, line)
        for path in pages.RESULTS.glob("*-*.jsonl")
        for line in harness.read(path)
        if "suite" in line
    ]
    for path, line in lines:
        assert unlike_documented(line, known, ("all",)) == [], f"{path.name}: {line['case']}"
        assert line["suite"] in bench.SUITES and not line["quick"]
        assert machine.is_quiet(line.get("others_cpus")), f"{path.name}: {line['case']}"
        json.dumps(line, allow_nan=False)


# ---- On paper


def test_the_model_of_the_gpus_kernels_is_arithmetic():
    gpu = gpu_model.Gpu("one", "sm_80", 10, 1e9, 1e12, 64, 32, 1 << 17)
    case = gpu_model.Case("step", "selective", "", 4, 16, 12)
    code = {
        "registers": 57,
        "threads": 256,
        "bytes_ahead": 64,
        "instructions": 50.0,
        "special": 3.0,
    }
    code |= {"wide": 5.0, "float32": 15.0, "float64": 1.0}
    found = gpu_model.predicted(case, code, gpu)
    # 64 registers a thread
    assert (found["blocks"], found["flight"]) == (4, 4 * 256 * 64)
    # 50 instructions at 128 * 10 * 1e9 a second, 28 bytes at 0.9e12
    assert found["limit"] == "instructions"
    assert math.isclose(found["share"], (28 / 0.9e12) / (50 / 1.28e12))
    rows = case._replace(rows=1 << 16)
    assert gpu_model.predicted(rows, code | {"threads": 512}, gpu)["blocks"] == 2
    slow = gpu_model.predicted(case, code | {"bytes_ahead": 1}, gpu)
    assert slow["limit"] == "loads under way"
    assert math.isclose(slow["share"], (28 / 0.9e12) / (16 * 0.8e-6 / (4 * 256 * 10)))


def test_the_page_of_the_gpus_kernels_is_made_of_its_results():
    document = json.loads(gpu_model.RESULTS.read_text())
    assert gpu_model.PAGE.read_text() == gpu_model.page(document)
    pairs = [(line["case"], line["gpu"]) for line in document["records"]]
    assert pairs == [
        (case.name, gpu.name)
        for case in gpu_model.CASES
        for gpu in gpu_model.GPUS
        if gpu_model.served(case, gpu)
    ] + [(case.name, gpu_model.MI300X.name) for case in gpu_model.TRITON_CASES]


def test_the_model_of_sharded_training_is_arithmetic(capsys):
    given = sharded_model.Training(
        parameters=1e9,
        gpus=8,
        tensors=1e6,
        tokens=1e6,
        passes=2,
        memory_bandwidth=1e12,
        network_bandwidth=1e10,
        latency=1e-3,
        peak=1e15,
        utilization=0.5,
    )
    assert sharded_model.step_bytes(given, 28) == 3.5e9
    assert math.isclose(sharded_model.collective_seconds(given), 6e-3 + 1.6e-3)
    assert sharded_model.passes_seconds(given, 3) == 4.5
    arguments = (
        "--parameters 1e9 --gpus 8 --tensors 1e6 --tokens 1e6 --memory-bandwidth 1e12 "
        "--network-bandwidth 1e10 --latency 1e-3 --peak 1e15"
    )
    assert bench.main(["sharded", *arguments.split(), "--utilization", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == sharded_model.comparison(given)
    assert "| bytes of the step, GB a GPU | 3.5 | 4 | 3.5 |" in printed
    assert "| its time at the memory's bandwidth, ms | 3.5 | 4 | 3.5 |" in printed
    assert "| time of all of them, ms | 0 | 7.6 | 7.6 |" in printed
    with pytest.raises(SystemExit) as error:
        bench.main(["sharded", "--gpus", "-1"])
    assert error.value.code == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_cpu_steps_loops_are_timed_one_by_one(tmp_path):
    source, program = harness.ROOT / "bench/cpu_arithmetic.cpp", tmp_path / "arithmetic"
    command = " ".join(re.findall("^// {5}(.*)", source.read_text(), re.MULTILINE)[:2])
    subprocess.run(
        command.replace("build/arithmetic", str(program)), shell=True, check=True, cwd=harness.ROOT
    )
    told = subprocess.run([program, "--quick"], check=True, capture_output=True, text=True).stdout
    figures = dict(re.findall(r"^(in .*?) +(\d+\.\d+)$", told, re.MULTILINE))
    assert len(figures) == 8 and all(float(figure) > 0 for figure in figures.values())


def test_what_another_process_compiled_meanwhile_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_code, "ROOT", tmp_path)
    names = iter(("theirs", "ours"))

    def make(folder):
        (folder / "report.txt").write_text(name := next(names))
        if name == "ours":
            return
        # ours begins and ends while theirs is made
        cuda_code.kept("loss", ["nvcc"], [], make)

    folder = cuda_code.kept("loss", ["nvcc"], [], make)
    assert (folder / "report.txt").read_text() == "ours"
    assert [*folder.parent.iterdir()] == [folder]
