"""The report: F1, seconds, what learned nothing or diverged, names, the picture."""

import contextlib
import math
import re
import statistics

import pytest
import torch

from uegr_kernels import recipes
from uegr_kernels.finetune import measures, task
from uegr_kernels.finetune.intervals import Interval

from .conftest import run, strict, texts, tsv

pytest.importorskip("transformers")

from uegr_kernels.finetune import report


def test_f1_stands_beside_every_accuracy_where_classes_are_uneven(tmp_path):
    from sklearn.metrics import f1_score

    out, rows = tmp_path / "out", texts(120)
    uneven = tsv(tmp_path / "train.tsv", [row for i, row in enumerate(rows) if i % 4 != 1])
    even = tsv(tmp_path / "even.tsv", texts(20, 5))
    one = tsv(tmp_path / "one.tsv", [row for row in texts(20, 6) if row[0] == "pos"])
    arguments = ["--train", uneven, "--model", "textcnn", "--lr", 1e-2]
    assert run(*arguments, "--shifted", f"even={even}", f"one={one}", "--output", out) == 0
    found = strict(out)
    named = {each["name"]: each["figures"]["uegr"] for each in found["measures"]}
    assert {name for name in named if name.startswith("F1, ")} == {
        f"F1, {name}"
        for name in named
        if name.startswith(("clean", "under", "with typos", "on ")) and not name.startswith("F1")
    }
    outcomes = found["runs"][0]["outcomes"]
    for key, name in (("clean", "clean"), ("pgd 0.05", "under PGD at 0.05"), ("shifted one",) * 2):
        expected = f1_score(
            outcomes["expected"][key],
            outcomes["predicted"][key],
            labels=[0, 1],
            average="macro",
            zero_division=0,
        )
        shown = "on one" if key == "shifted one" else name
        assert named[f"F1, {shown}"]["value"] == pytest.approx(expected)
    even_test = ["--test", even, "--shifted", f"one={one}", f"even={even}", "--overwrite"]
    assert run(*arguments, *even_test, "--output", out) == 0
    names = [each["name"] for each in strict(out)["measures"]]
    assert [name for name in names if name.startswith("F1")] == ["F1, on one"]


def test_seconds_have_an_interval_and_outlive_a_stop(train, tmp_path, monkeypatch):
    out, steps = tmp_path / "out", []
    noticed = contextlib.nullcontext(lambda: steps.append(1) or len(steps) == 8)
    arguments = ["--train", train, "--model", "textcnn", "--output", out]
    with monkeypatch.context() as patch:
        patch.setattr(task, "interrupts_noticed", lambda: noticed)
        assert run(*arguments) == 130
    assert run(*arguments, "--resume") == 0
    found = strict(out)
    seconds = found["runs"][0]["seconds"]
    figure = found["measures"][-1]["figures"]["uegr"]
    assert found["measures"][-1]["name"] == "seconds a step" and len(seconds) > 2
    assert figure["value"] == pytest.approx(statistics.median(seconds))
    assert min(seconds) <= figure["low"] <= figure["value"] <= figure["high"] <= max(seconds)
    assert figure["low"] < figure["high"]
    assert re.search(
        r"\| seconds a step +\| +[\d.e-]+ \([\d.e-]+ to ", (out / "report.md").read_text()
    )


def test_a_model_that_learned_nothing_is_named(train, tmp_path):
    arguments = ["--train", train, "--model", "textcnn", "--compare", "plain,at", "--lr"]
    assert run(*arguments, 0, "--output", tmp_path / "nothing") == 0
    said = strict(tmp_path / "nothing")["warnings"]
    assert [line.partition(" ")[0] for line in said] == ["`plain`", "`at`"]
    assert "is not shown to have learned anything" in said[0]
    assert "always answering 'neg' is right on 50.0 %" in said[0]
    assert f"**{said[0]}**" in (tmp_path / "nothing" / "report.md").read_text()
    assert run(*arguments, 1e-2, "--epochs", 4, "--output", tmp_path / "much") == 0
    found = strict(tmp_path / "much")
    assert found["warnings"] == [] and found["baseline"] == 0.5
    assert (
        "the commonest label, is right on 50.0 %" in (tmp_path / "much" / "report.md").read_text()
    )


def test_a_diverged_training_is_told_in_words(train, tmp_path):
    out = tmp_path / "out"
    options = ["--trainer-options", "max_grad_norm=0.0", "--lr", 1e38, "--compare", "plain,at"]
    assert run("--train", train, "--model", "textcnn", *options, "--output", out) == 1
    found, said = strict(out), (out / "report.md").read_text()
    assert found["measures"] == [] and len(found["warnings"]) == 2
    assert "`plain`, seed 0: training diverged (the model's outputs are no finite" in said
    assert "Try a smaller --lr" in said and "nan" not in said.lower()
    assert not (out / "plain" / "0" / "model.safetensors").exists()
    assert not (out / "report.png").exists()


def test_one_diverged_seed_leaves_the_others(train, tmp_path, monkeypatch):
    out, measure, asked = tmp_path / "out", measures.measure, []

    def second_broken(classifier, data):
        asked.append(classifier)
        if len(asked) == 2:
            with torch.no_grad():
                classifier.embedding.weight.fill_(math.inf)
        return measure(classifier, data)

    monkeypatch.setattr(measures, "measure", second_broken)
    arguments = ["--train", train, "--model", "textcnn", "--compare", "plain,at", "--seeds", 2]
    assert run(*arguments, "--output", out) == 0
    found = strict(out)
    assert "`at`, seed 0: training diverged" in found["warnings"][0]
    assert [*found["measures"][0]["figures"]] == ["plain", "at"]
    assert re.match(r"Under PGD at 0.02 `at` reaches .* and `plain` ", found["sentence"])


def test_the_best_epoch_is_one_before_training_diverged(train, tmp_path, monkeypatch):
    out, epochs = tmp_path / "out", []

    def broken(logits, expected):
        epochs.append(1)
        return 0.9 if len(epochs) == 1 else -math.inf

    monkeypatch.setattr(measures, "metric_of", lambda labels: broken)
    assert run("--train", train, "--model", "textcnn", "--output", out) == 0
    found = strict(out)
    assert found["runs"][0]["best_epoch"] == 1.0
    assert "diverged at some time" in found["warnings"][0]
    assert "the model is that of epoch 1." in found["warnings"][0]


def test_scores_of_what_is_not_finite_are_below_all_others():
    for labels, worst in ((["a", "b"], [[0.0, 1.0]] * 3), ([], [[3.0], [2.0], [1.0]])):
        score = measures.metric_of(labels)
        logits = torch.tensor(worst)
        assert score(logits, [0, 0, 0] if labels else [1.0, 2.0, 3.0]) > score(
            torch.full_like(logits, math.nan), [0, 0, 0]
        )


def test_names_that_would_break_the_table(train, tmp_path):
    out, name = tmp_path / "out", "a|b\nc 日本語"
    arguments = ["--train", train, "--model", "textcnn", "--ood", f"{name}={train}"]
    assert run(*arguments, "--shifted", f"{name}={train}", "--output", out) == 0
    lines = (out / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert any(r"on a\|b c 日本語" in line for line in table)
    wide = [len(line) + sum(c in "日本語" for c in line) for line in table]
    assert len({*wide}) == 1, "the columns stand under each other on a terminal"
    made_by = lines[lines.index("Made by") + 2 :]
    assert all(line.startswith("    ") for line in made_by if line)


@pytest.mark.parametrize("regression", [False, True])
def test_the_picture_s_words_are_whole(tmp_path, monkeypatch, regression):
    from matplotlib.figure import Figure

    save = Figure.savefig

    def looked_at(figure, path):
        save(figure, path)
        label = figure.get_supxlabel() and figure._supxlabel.get_window_extent()
        assert 0 <= label.x0 and label.x1 <= figure.bbox.x1
        axes = figure.axes[0].get_window_extent()
        assert axes.width > figure.bbox.width / 3
        lines = figure.axes[0].get_lines()
        looks = {(line.get_color(), line.get_marker()) for line in lines if len(line.get_xdata())}
        seen.append(looks)

    seen = []
    monkeypatch.setattr(Figure, "savefig", looked_at)
    figures = {recipe: Interval(0.5, 0.2, 0.7) for recipe in recipes.NAMES}
    name = "correlation, on " if regression else "on "
    row = report.Row(name + "a set of a very long name " * 9, figures, "" if regression else "%")
    report.draw(tmp_path / "a.png", [row], recipes.NAMES)
    looks = {look for look in seen[0] if look[1] in "osD^vPX"}
    assert len(looks) == len(recipes.NAMES), "no two recipes look alike"
