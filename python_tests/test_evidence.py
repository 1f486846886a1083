"""The evidence on a pre-trained model (`python -m bench.accuracy --model minilm`), on a small
BERT made here.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy import stats

import uegr_kernels as uk

# which the evidence trains by
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bench import accuracy, harness
from bench.evidence import accuracy as command
from bench.evidence import data as sets
from bench.evidence import intervals, plan, pretrained, pretrained_report, runs, studies, training

ROOT = pathlib.Path(__file__).parent.parent
WORDS = {"neg": "bad dull slow weak", "pos": "good fine fast strong"}
OTHERS = "film number a the is so very".split()


def text(label: str, i: int) -> str:
    return f"the film is {WORDS[label].split()[i % 4]} number {'very ' * (i % 3)}so"


@pytest.fixture
def data(tmp_path):
    """Gives `sst2` and the sets that its models are scored on too, of a few texts."""
    for name in ("sst2", *pretrained.FURTHER["sst2"]):
        for part, count in (("train", 60), ("test", 14)) if name == "sst2" else (("test", 6),):
            path = tmp_path / "data" / name / f"{part}.tsv.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{label}\t{text(label, i)}\n" for i in range(count // 2) for label in WORDS]
            path.write_bytes(gzip.compress("".join(["label\ttext\n", *lines]).encode()))
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path):
    """Gives a random BERT of two layers with its tokenizer, as Transformers saves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *OTHERS,
        *" ".join(WORDS.values()).split(),
    ]
    (folder / "vocab.txt").write_text(
        "\n".join([*words, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")])
    )
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small(checkpoint):
    """Gives what makes a run small."""
    return {
        **{
            "model": str(checkpoint),
            "examples": 24,
            "held": 8,
            "epochs": 2,
            "length": 16,
            "lr": 5e-3,
        },
        **{"attacked": 6, "mistyped": 6},
    }


@pytest.fixture
def tiers(monkeypatch):
    """Gives every method, on one set with two seeds."""
    monkeypatch.setattr(pretrained, "TIERS", {1: (tuple(pretrained.METHODS), ("sst2",), 2)})
    monkeypatch.setattr(pretrained_report, "TIERS", pretrained.TIERS)


@pytest.mark.long
def test_every_method_is_tuned_run_and_reported(data, small, tiers, tmp_path):
    runs = pretrained.PretrainedRuns(data, tmp_path, 1, "here")
    plan = pretrained.TierPlan(runs, small)
    plan.finish(1)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    finals = [line for line in lines if line["settings"]["final"]]
    assert {line["settings"]["method"] for line in finals} == set(pretrained.METHODS)
    for line in finals:
        result = line["result"]
        assert len(result["clean"]) == 14 and set(result["clean"]) <= {"0", "1"}
        assert [len(each) for each in (*result["fgm"], *result["pgd"])] == [6] * 6
        assert len(result["typos 0.05"]) == len(result["cad-imdb"]) == 6
    shares = {line["settings"]["method"]: line["result"]["share"] for line in finals}
    assert shares["uegr_all_selected"] == 1 and 0 < shares["uegr_rank_salient"] < 0.9
    again = pretrained.PretrainedRuns(data, tmp_path, 1, "here")
    before = len(lines)
    pretrained.TierPlan(again, small).finish(1)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == before, "made again"
    written = pretrained_report.write(pretrained.TierPlan(again, small), tmp_path)
    assert "not finished" not in written.split("tier 1, sst2")[0]
    page = (tmp_path / "README.md").read_text()
    summary = (tmp_path / "summary.md").read_text()
    for text in (page, summary):
        assert all(question in text for question in pretrained_report.QUESTIONS)
        assert all(text.count(f"\n| {name} | ") >= 1 for name in pretrained.METHODS)
    assert summary.count("\n| uegr | ") == 1
    assert (tmp_path / "sst2.png").stat().st_size > 10_000


def test_a_row_stands_only_where_all_of_its_seeds_do(data, small, tiers, tmp_path):
    runs = pretrained.PretrainedRuns(data, tmp_path, 1, "here")
    plan = pretrained.TierPlan(runs, small)
    first, second = plan.finals("sst2", "plain", 2)["both"]
    runs.finish([first], "one seed")
    assert pretrained_report.whole(plan, "sst2")[0] == {}
    runs.finish([second], "the other")
    assert list(pretrained_report.whole(plan, "sst2")[0]) == [("plain", "both")]


def test_every_setting_counts(small):
    run = pretrained.Run("sst2", "at", 0, 0.01)
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        other = (
            not value
            if isinstance(value, bool)
            else 0.5
            if value is None
            else f"{value}x"
            if isinstance(value, str)
            else value + 1
        )
        assert dataclasses.replace(run, **{field.name: other}).key != run.key


def test_runs_of_another_protocol_are_not_taken(data, small, tmp_path):
    line = {
        "settings": dataclasses.asdict(pretrained.Run("sst2", "plain", 0, protocol=0)),
        "result": {},
    }
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    assert not pretrained.PretrainedRuns(data, tmp_path, 1, "here").done


# What is committed


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Gives a copy of the committed runs, their data's digests and sizes as they were, and UEGR
    with the plain dropout that it had then; a run that is missing fails.
    """
    folder = command.RESULTS
    for name in ("runs.jsonl", "cost.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    records = runs.whole_records(folder / "runs.jsonl")
    digests = {record["settings"]["data"]: record.get("digest", "") for record in records}
    monkeypatch.setattr(plan, "digest", lambda folder, name: digests[name])
    rows = [sets.Row("a", ("text",))] * 4000
    monkeypatch.setattr(studies, "read", lambda *_: sets.TextSet(rows, rows, "accuracy"))
    uegr = plan.METHODS["uegr"]
    plain = dataclasses.replace(uegr, fixed=uegr.fixed | {"adaptive_dropout": False})
    monkeypatch.setitem(plan.METHODS, "uegr", plain)
    monkeypatch.setattr(plan.MethodRuns, "protocol", 1)
    here = {"machine": {"cpu": records[0]["cpu"]}, "versions": {"torch": records[0]["torch"]}}
    monkeypatch.setattr(harness, "environment", lambda command: here | {"commit": "now"})
    monkeypatch.setattr(runs, "results", lambda calls, *_: pytest.fail(f"{len(calls)} made again"))
    return folder, tmp_path


def test_committed_runs_are_known_and_make_the_committed_report(committed, capsys):
    folder, output = committed
    call = re.search(r"^`(python -m bench.accuracy .*?)`", (folder / "main.md").read_text(), re.M)[
        1
    ]
    arguments = [*call.split()[3:], "--output", str(output)]
    options = command.parser().parse_args(arguments)
    # then the same as uegr
    options.methods.remove("uegr_plain_dropout")
    command.run(options, call)
    texts = [path for path in folder.iterdir() if path.suffix in (".md", ".json", ".jsonl")]
    assert len(texts) > 10
    for path in texts:
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_committed_run_of_the_pre_trained_model_is_known(tmp_path):
    folder = pretrained.RESULTS
    records = runs.whole_records(folder / "runs.jsonl")
    for protocol in range(1, pretrained.PROTOCOL + 1):
        known = pretrained.PretrainedRuns(tmp_path, folder, 1, "here", protocol=protocol)
        made = [pretrained.Run(**record["settings"]) for record in records]
        assert all((run in known) == (run.protocol == protocol) for run in made)
    assert records
    pretrained_report.write(pretrained.TierPlan(known, {}), tmp_path)
    for name in ("README.md", "summary.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_protocol_is_part_of_every_key(data, tmp_path, monkeypatch):
    """Records without one are of the first; a new one leaves none of them known."""
    settings = training.Settings("sst2", "textcnn", "plain", 0, protocol=1)
    other = dataclasses.replace(settings, protocol=training.PROTOCOL)
    monkeypatch.setattr(plan.MethodRuns, "protocol", 1)
    old = {key: value for key, value in vars(settings).items() if key != "protocol"}
    (tmp_path / "runs.jsonl").write_text(json.dumps({"settings": old, "result": {"a": 1}}) + "\n")
    known = plan.MethodRuns(data, ["sst2"], tmp_path, 1, 1, "here")
    assert known.key_of(settings) != known.key_of(other)
    assert known[settings] == {"a": 1} and other not in known
    monkeypatch.setattr(plan.MethodRuns, "protocol", training.PROTOCOL)
    assert not plan.MethodRuns(data, ["sst2"], tmp_path, 1, 1, "here").done


RUN = """
import pathlib, sys, json, torch
from bench.evidence import pretrained
torch.set_num_threads(1)
run = pretrained.Run(**json.loads(sys.argv[1]))
print(json.dumps(pretrained.outcomes(run, pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))))
"""


@pytest.mark.long
def test_a_run_killed_midway_goes_on_to_the_same_outcomes(data, small, tmp_path):
    run = pretrained.Run("sst2", "uegr", 0, 0.025, **small | {"epochs": 8})
    command = [sys.executable, "-c", RUN, json.dumps(dataclasses.asdict(run)), str(data)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kept = tmp_path / "killed"
    process = subprocess.Popen([*command, str(kept)], env=environment, stdout=subprocess.DEVNULL)
    while not any(kept.glob("checkpoints/checkpoint-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept.exists(), "it ended before it could be killed"
    found = [
        json.loads(
            subprocess.check_output([*command, str(path)], env=environment, text=True).splitlines()[
                -1
            ]
        )
        for path in (kept, tmp_path / "whole")
    ]
    for result in found:
        del result["processor_seconds_per_step"]
    assert found[0] == found[1]


def test_the_interval_of_one_seeds_accuracy_is_scipys():
    right = np.random.default_rng(1).random(300) < 0.8
    mine = intervals.of_accuracy(["".join("01"[int(each)] for each in right)])
    its = stats.bootstrap(
        (right,), np.mean, n_resamples=10_000, method="percentile", random_state=2
    )
    assert mine.mean == right.mean()
    assert mine.low == pytest.approx(its.confidence_interval.low, abs=4e-3)
    assert mine.high == pytest.approx(its.confidence_interval.high, abs=4e-3)


def test_the_interval_of_a_paired_difference_is_scipys():
    draw = np.random.default_rng(1)
    first, second = draw.random(300) < 0.8, draw.random(300) < 0.7
    mine = intervals.of_difference(
        *(["".join("01"[int(each)] for each in one)] for one in (first, second))
    )
    its = stats.bootstrap(
        (first.astype(int), second.astype(int)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        random_state=2,
    )
    assert mine.low == pytest.approx(its.confidence_interval.low, abs=6e-3)
    assert mine.high == pytest.approx(its.confidence_interval.high, abs=6e-3)


def test_the_interval_over_seeds_is_scipys():
    values = [0.5, 0.62, 0.55, 0.71, 0.58]
    its = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", random_state=2
    )
    mine = intervals.of_figures(values)
    assert mine.low == pytest.approx(its.confidence_interval.low, abs=6e-3)
    assert mine.high == pytest.approx(its.confidence_interval.high, abs=6e-3)


def test_seeds_that_differ_widen_the_interval():
    alike = intervals.of_accuracy(["1" * 70 + "0" * 30] * 4)
    unlike = intervals.of_accuracy(["1" * n + "0" * (100 - n) for n in (50, 60, 80, 90)])
    assert alike.mean == unlike.mean == pytest.approx(0.7)
    assert unlike.high - unlike.low > 1.5 * (alike.high - alike.low)


def test_a_clear_difference_has_a_small_p_and_none_a_large_one():
    assert intervals.of_difference(["1" * 100] * 3, ["0" * 100] * 3).p < 0.001
    assert intervals.of_difference(["10" * 50] * 3, ["01" * 50] * 3).p > 0.5


@pytest.mark.parametrize(
    "p, corrected",
    [
        ((0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02)),
        ((0.5, 0.75), (1.0, 1.0)),
        ((0.001,), (0.001,)),
        ((0.9, 0.01, 0.4), (0.9, 0.03, 0.8)),
    ],
)
def test_holm(p, corrected):
    assert intervals.holm(p) == pytest.approx(corrected)


def test_wrong_arguments_are_refused_in_words(data, tmp_path, capsys):
    common = ["--model", "minilm", "--data", str(data), "--output", str(tmp_path)]
    for more, words in (
        (["--tiers", "7"], "there are 1, 2, 3"),
        (["--methods", "uegrr"], "uegr_all_selected"),
    ):
        assert accuracy.main([*common, *more]) == 2
        assert words in capsys.readouterr().err


# Typos


def test_typos_change_about_the_share_of_letters_that_was_asked_for():
    text = "the quick brown fox jumps over the lazy dog and runs away " * 200
    for kind in ("typos", "keyboard", "swaps", "drops"):
        (changed,) = uk.analysis.corrupted([text], kind, 0.1, 3)
        words = sum(a != b for a, b in zip(text.split(), changed.split(), strict=True))
        assert 0.15 < words / len(text.split()) < 0.5, kind
    assert uk.analysis.corrupted([text], rate=0.0) == [text]


def test_typos_depend_on_seed_and_text_alone():
    texts = ["a good film", "a bad one, so slow"]
    first = uk.analysis.corrupted(texts, rate=0.5, seed=1)
    assert uk.analysis.corrupted(texts[::-1], rate=0.5, seed=1) == first[::-1]
    assert uk.analysis.corrupted(texts, rate=0.5, seed=2) != first
    assert uk.analysis.corrupted([], rate=0.5) == []


def test_each_kind_of_typo_does_what_its_name_says():
    (swapped,) = uk.analysis.corrupted(["abcdefgh"], "swaps", 1.0)
    assert swapped == "badcfehg"
    assert uk.analysis.corrupted(["one two"], "drops", 1.0) == ["o t"]
    (typed,) = uk.analysis.corrupted(["Gg 12, !"], "keyboard", 1.0)
    assert typed[0] in "TYFHVB" and typed[1] in "tyfhvb" and typed[2:] == " 12, !"
    assert sorted(uk.analysis.corrupted(["今天"], "keyboard", 1.0)[0]) == sorted("今天")


def test_wrong_arguments_of_typos_are_refused():
    with pytest.raises(TypeError, match="one string"):
        uk.analysis.corrupted("a text")
    with pytest.raises(ValueError, match="kind='letters'"):
        uk.analysis.corrupted(["a"], "letters")
    with pytest.raises(ValueError, match="rate=2"):
        uk.analysis.corrupted(["a"], rate=2)
