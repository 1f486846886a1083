"""`python -m bench.accuracy` on sets of a few texts."""

import gzip
import json
import math
import statistics

import pytest
import torch

import uegr_kernels as uk

# which the evidence trains by
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bench import accuracy
from bench.evidence import accuracy as command
from bench.evidence import data as sets
from bench.evidence import plan, report, studies, training
from uegr_kernels.models import MODELS

WORDS = {"neg": "bad dull slow weak", "pos": "good fine fast strong"}
QUICK = (
    "--models textcnn --examples 24 --epochs 2 --length 6 --attacked 8 --trials 2 --seeds 2 "
    "--wait 0"
).split()


def text(label: str, i: int) -> str:
    return f"{WORDS[label].split()[i % 4]} film number {i % 5} {'x' * (i % 3)}"


def rows(count: int) -> list[tuple[str, str]]:
    return [(label, text(label, i)) for i in range(count // 2) for label in WORDS]


@pytest.fixture
def data(tmp_path):
    """Gives two sets in our format, equal but in their names."""
    for name in ("one", "two"):
        for part, count in (("train", 40), ("test", 12)):
            path = tmp_path / "data" / name / f"{part}.tsv.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                gzip.compress(
                    "".join(f"{a}\t{b}\n" for a, b in [("label", "text"), *rows(count)]).encode()
                )
            )
    return tmp_path / "data"


def call(data, output, *more: str) -> int:
    return accuracy.main(["--data", str(data), "--output", str(output), *QUICK, *more])


def settings(**changes) -> training.Settings:
    return training.Settings(
        **{
            "data": "one",
            "model": "textcnn",
            "method": "plain",
            "seed": 0,
            "epochs": 2,
            "length": 6,
        }
        | changes
    )


@pytest.mark.long
def test_every_method_trains_and_is_reported(data, tmp_path, capsys):
    assert (
        call(
            data,
            tmp_path / "out",
            "--sets",
            "one",
            "--methods",
            "all",
            "--seeds",
            "1",
            "--epochs",
            "1",
            "--trials",
            "1",
        )
        == 0
    )
    told = capsys.readouterr().out
    for name in plan.METHODS:
        assert f"| {name} | " in told
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    ]
    finals = [line["result"] for line in lines if line["settings"]["final"]]
    assert len(finals) == len(plan.METHODS)
    assert all(0 <= result[key][1] <= 1 for result in finals for key in ("fgm", "pgd"))
    shares = {line["settings"]["method"]: line["result"]["share"] for line in lines}
    assert shares["plain"] == 1 and 0.1 < shares["child_tuning_f"] < 0.6 and shares["roast"] < 0.6


@pytest.mark.parametrize("model", ["bilstm", "texthan", "transformer"])
def test_every_model_trains(data, model):
    figures, classifier = training.run(
        settings(model=model, method="uegr", optimizer="selective_adamw", epochs=8, lr=1e-2), data
    )
    assert figures["validation"] > 0.6 and type(classifier.model) is MODELS[model]


@pytest.mark.long
def test_what_is_done_is_not_done_again(data, tmp_path, monkeypatch, capsys):
    options = ("--sets", "one,two", "--methods", "uegr", "--studies", "main,passes")
    assert call(data, tmp_path, *options) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(training, "run", None)
    assert call(data, tmp_path, *options) == 0
    assert capsys.readouterr().out == first
    assert {path.name for path in tmp_path.iterdir()} >= {
        "runs.jsonl",
        "points.json",
        "README.md",
        "summary.md",
        "main-textcnn.png",
        "passes.png",
    }
    assert "| uegr | " in (tmp_path / "summary.md").read_text()
    assert (
        call(data, tmp_path, "--sets", "one,two", "--methods", "uegr", "--studies", "passes") == 0
    )
    # a narrower call leaves the other studies there
    assert "### textcnn: mean over" in (tmp_path / "README.md").read_text()
    capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    row = next(
        row
        for row in json.loads((tmp_path / "summary.json").read_text())
        if (row["set"], row["method"]) == ("one", "uegr")
    )
    found = [
        line["result"]["test"]
        for line in lines
        if line["settings"]["final"]
        and line["settings"]["data"] == "one"
        and line["settings"]["method"] == "uegr"
        and line["settings"]["options"]["passes"] == 2
    ]
    assert len(found) == row["seeds"] == 2
    assert row["test"] == pytest.approx(
        {"mean": statistics.fmean(found), "sd": statistics.stdev(found)}, abs=1e-5
    )


@pytest.mark.long
def test_all_studies(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "SIZES", (8, 16, 10**6))
    monkeypatch.setattr(studies, "GRID", (0.1, 0.5))
    monkeypatch.setattr(studies, "EPSILON", (0.1,))
    monkeypatch.setattr(
        studies,
        "variants",
        lambda: iter([{"normalization": "rank", "direction": "salient", "rescale": False}]),
    )
    chosen = "passes,dropout,size,epsilon,selection,drop_attack,cost"
    assert (
        call(
            data,
            tmp_path,
            "--sets",
            "one",
            "--methods",
            "dropout",
            "--seeds",
            "1",
            "--epochs",
            "1",
            "--studies",
            chosen,
        )
        == 0
    )
    told = capsys.readouterr().out
    for study in studies.STUDIES.values():
        assert study.title in told
    assert "| sgd | rank | salient | - | no | " in told
    # more than the set has
    assert "| uegr | " in told.split("size of the training set")[1] and "1,000,000" not in told
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "passes",
        "dropout",
        "size",
        "epsilon",
        "drop_attack",
    }


def test_a_run_goes_on_from_its_last_epoch(data, tmp_path, monkeypatch):
    """Bit for bit, with the selection's masks and the random state."""
    chosen = settings(method="uegr", optimizer="selective_adamw", epochs=3)
    whole, _ = training.run(chosen, data)
    step, calls = uk.SelectiveAdamW.step, []

    def stops(*arguments):
        calls.append(None)
        # of two steps an epoch: the first of the third
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(uk.SelectiveAdamW, "step", stops)
        training.run(chosen, data, tmp_path / "state")
    assert (tmp_path / "state").exists()
    again, _ = training.run(chosen, data, tmp_path / "state")
    for result in (whole, again):
        del result["seconds_per_step"], result["processor_seconds_per_step"]
    assert again == whole
    assert not (tmp_path / "state").exists()


def test_validation_is_a_part_of_the_training_set(data):
    whole = sets.read(data, "one")
    train, held = training.split(whole, settings(examples=0))
    assert len(held) == 8 and len(train) == 32
    assert sorted(train + held) == sorted(whole.train)
    other, _ = training.split(whole, settings(examples=0, seed=1))
    assert other != train


def test_trials_use_every_value_as_often_as_the_others():
    for name, method in plan.METHODS.items():
        points = plan.trials(name, method, 6, plan.RATES)
        assert len(points) == 6
        for key, values in (plan.RATES | method.space).items():
            counts = [sum(point.get(key) == value for point in points) for value in values]
            assert key in method.fixed or max(counts) - min(counts) <= 1


@pytest.mark.long
def test_a_control_has_its_parents_point(data, tmp_path):
    call(data, tmp_path, "--sets", "one", "--methods", "at,at_epsilon_0,dropout,dropout_3x")
    lines = [
        json.loads(line)["settings"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()
    ]
    finals = [line for line in lines if line["final"] and line["seed"] == 0]
    at, control = sorted(
        (line for line in finals if line["method"] == "at"),
        key=lambda line: -line["options"]["epsilon"],
    )
    assert control == at | {"options": {"epsilon": 0.0}}
    plain, longer = (line for line in finals if line["method"] == "plain")
    assert longer == plain | {"epochs": 3 * plain["epochs"]}
    # controls are not tuned
    assert not any(line["options"].get("epsilon") == 0 for line in lines if not line["final"])


@pytest.mark.long
def test_runs_from_before_adaptive_dropout_are_the_ablation(data, tmp_path):
    """UEGR's runs on file that say nothing of their dropout had the model's own: they are
    `uegr_plain_dropout`, never `uegr`.
    """
    output = tmp_path / "out"
    assert (
        call(data, output, "--sets", "one", "--methods", "uegr,uegr_plain_dropout", "--seeds", "1")
        == 0
    )
    lines = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    of = {
        adaptive: [
            line
            for line in lines
            if line["settings"]["options"].get("adaptive_dropout") is adaptive
        ]
        for adaptive in (True, False)
    }
    # two tuning runs, at whose point the ablation stands
    assert len(of[True]) == 2 + 1 and len(of[False]) == 1
    assert (
        of[False][0]["settings"] | {"options": of[True][-1]["settings"]["options"]}
        == of[True][-1]["settings"]
    )
    old = [line for line in lines if line not in of[True]]
    for line in old:
        line["settings"]["options"].pop("adaptive_dropout", None)
    (output / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert (
        call(data, output, "--sets", "one", "--methods", "uegr,uegr_plain_dropout", "--seeds", "1")
        == 0
    )
    again = [
        json.loads(line)["settings"] for line in (output / "runs.jsonl").read_text().splitlines()
    ][len(old) :]
    assert [line["options"]["adaptive_dropout"] for line in again] == [True] * 3


def test_names_as_the_papers_write_them():
    options = command.parser().parse_args(
        "--data x --methods R-Drop,R-AT-SU,UEGR,DropAttack,FreeLB,plain --models "
        "TextCNN,hf:A/b".split()
    )
    assert options.methods == ["r_drop", "r_at_su", "uegr", "drop_attack", "free_lb", "dropout"]
    assert options.models == ["textcnn", "hf:A/b"]
    assert set(uk.recipes.NAMES) <= {method.recipe for method in plan.METHODS.values()}


def test_means_count_twins_once():
    assert report.over_sets({"mr": 0.5, "sst2": 0.7, "agnews": 0.9}) == pytest.approx(
        (0.6 + 0.9) / 2
    )


def test_the_paired_test_against_a_worked_example():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 3.4641 at two degrees of
    freedom.
    """
    found = {
        ("m", "d", name, seed): {"test": value}
        for seed in range(3)
        for name, value in (("dropout", 0.5), ("at", 0.51 + 0.01 * seed))
    }
    gaps, p = report.Main(found).against("m", "at", "dropout", report.accuracy)
    assert gaps == pytest.approx([0.01, 0.02, 0.03])
    assert p == pytest.approx(0.07418, abs=1e-5)
    assert report.mean_and_deviation(gaps) == "2.0 ± 1.0"
    assert math.isnan(report.Main(found).against("m", "dropout", "dropout", report.accuracy)[1])


@pytest.mark.long
def test_robustness_relative_to_the_base(data, tmp_path, capsys):
    """UEGR Table III's metric: (s - s_base) / (1 - s_base)."""
    assert (
        call(
            data,
            tmp_path,
            "--sets",
            "one",
            "--methods",
            "at",
            "--shifted",
            "two",
            "--adversarial",
            "two",
            "--ood",
            "two",
        )
        == 0
    )
    told = capsys.readouterr().out.split("Robustness relative")[1]
    assert "| dropout | 0.0" in told
    results = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    finals = [line["result"] for line in results if line["settings"]["final"]]
    for result in finals:
        # the same texts
        assert result["shifted"] == result["test"]
        assert result["auroc"] == pytest.approx(0.5)
    base, at = (
        statistics.fmean(
            line["result"]["test"]
            for line in results
            if line["settings"]["final"] and line["settings"]["method"] == m
        )
        for m in ("plain", "at")
    )
    assert f"| at | {100 * (at - base) / (1 - base):.1f} ± " in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sets", "three"], "no such set; there are one, two"),
        (["--methods", "dropuot"], "'dropuot' is none of none, dropout"),
        (["--models", "bert"], "'bert' is none of textcnn"),
        (["--models", "hf:/nowhere", "--sets", "one"], "there is no such folder"),
        (["--seeds", "0"], "not a positive number"),
        (["--shifted", "three", "--sets", "one"], "no test.tsv.gz there"),
        (["--lr", "1e-3,nan"], "no positive number"),
        (["--examples", "-1"], "less than 0"),
    ],
)
def test_wrong_arguments(data, tmp_path, capsys, arguments, said):
    if arguments[0] == "--models" and "hf:" in arguments[1]:
        pytest.importorskip("transformers")
    try:
        status = call(data, tmp_path, *arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_line_that_was_cut_off_is_made_again(data, tmp_path, capsys):
    options = (
        "--sets",
        "one",
        "--methods",
        "dropout",
        "--trials",
        "1",
        "--seeds",
        "1",
        "--epochs",
        "1",
    )
    assert call(data, tmp_path, *options) == 0
    whole = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(whole)[:-40])
    assert call(data, tmp_path, *options) == 0
    again = [
        json.loads(line)["settings"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()
    ]
    assert again == [json.loads(line)["settings"] for line in whole]
    (tmp_path / "runs.jsonl").write_text("no JSON\n")
    assert call(data, tmp_path, *options) == 2
    assert "is no file of runs" in capsys.readouterr().err


def test_other_texts_by_the_same_name_are_another_set(data, tmp_path):
    options = (
        "--sets",
        "one",
        "--methods",
        "dropout",
        "--trials",
        "1",
        "--seeds",
        "1",
        "--epochs",
        "1",
    )
    assert call(data, tmp_path / "out", *options) == 0
    train = data / "one" / "train.tsv.gz"
    train.write_bytes(gzip.compress(gzip.decompress(train.read_bytes()) + b"pos\tfine film\n"))
    sets.read.cache_clear()
    assert call(data, tmp_path / "out", *options) == 0
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["neg"], "every label is 'neg'"),
        (["neg", "pos"], "the test has the label 'unheard of', which one's training set"),
    ],
)
def test_sets_that_cannot_be_trained_on(data, tmp_path, capsys, labels, said):
    """Said before the first run."""
    for part, extra in (("train", ""), ("test", "unheard of\tgood\n" * (len(labels) - 1))):
        lines = "".join(f"{label}\t{text(label, i)}\n" for i in range(6) for label in labels)
        (data / "one" / f"{part}.tsv.gz").write_bytes(
            gzip.compress(f"label\ttext\n{lines}{extra}".encode())
        )
    sets.read.cache_clear()
    assert call(data, tmp_path / "out", "--sets", "one") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_whole_numbers_are_classes(data):
    lines = "".join(f"{i % 30}\tword {i}\n" for i in range(90))
    (data / "one" / "train.tsv.gz").write_bytes(gzip.compress(f"label\ttext\n{lines}".encode()))
    sets.read.cache_clear()
    assert sets.read(data, "one").metric == "accuracy"


def test_only_line_feeds_end_lines(data):
    """Texts may hold what str.splitlines takes for an end."""
    train = "".join(f"{label}\tone\u2028two\x85three {i}\r\n" for i in range(5) for label in WORDS)
    (data / "one" / "train.tsv.gz").write_bytes(gzip.compress(("label\ttext\r\n" + train).encode()))
    sets.read.cache_clear()
    found = sets.read(data, "one").train
    assert len(found) == 10 and found[0] == sets.Row("neg", ("one\u2028two\x85three 0",))


def test_a_broken_line_is_named(data, capsys, tmp_path):
    (data / "one" / "test.tsv.gz").write_bytes(gzip.compress(b"label\ttext\nneg\tfine\nnothing\n"))
    assert call(data, tmp_path) == 2
    assert "test.tsv.gz, line 3: 'nothing' is not label<TAB>text" in capsys.readouterr().err


GLUE = {
    "SST-2": ("sentence\tlabel", "{text}\t{label}"),
    "CoLA": ("", "src\t{label}\t*\t{text}"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{text}\tand {text}"),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore",
        "0\tx\t{text}\tand {text}\t{label}.{index}",
    ),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\t{text}\tand {text}\t{label}"),
}


@pytest.fixture
def glue(tmp_path):
    for name, (head, line) in GLUE.items():
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True)
        for part, count in (("train", 40), ("dev", 12)):
            lines = [
                line.format(text=content, label=int(label == "pos"), index=i)
                for i, (label, content) in enumerate(rows(count))
            ]
            (folder / f"{part}.tsv").write_text("\n".join([head] * bool(head) + lines) + "\n")
    return tmp_path / "glue"


def test_glue_is_read(glue):
    assert set(sets.sets_in(glue)) == set(GLUE)
    assert {name: sets.read(glue, name).metric for name in GLUE} == {
        **{
            "SST-2": "accuracy",
            "CoLA": "matthews",
            "MRPC": "accuracy",
            "STS-B": "correlation",
            "RTE": "accuracy",
        }
    }
    assert sets.read(glue, "CoLA").train[0] == sets.Row("0", (text("neg", 0),))
    assert sets.read(glue, "MRPC").test[1] == sets.Row(
        "1", (text("pos", 0), "and " + text("pos", 0))
    )
    with (glue / "RTE" / "train.tsv").open("a") as file:
        file.write("1\tcut short\n")
    sets.read.cache_clear()
    assert len(sets.read(glue, "RTE").train) == 40


@pytest.mark.long
def test_a_checkpoint_of_transformers(glue, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    words = sorted({word for label, content in rows(40) for word in content.split()} | {"and"})
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    config = transformers.BertConfig(
        vocab_size=5 + len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    options = (
        "--model",
        f"hf:{tmp_path / 'bert'}",
        "--methods",
        "uegr",
        "--lr",
        "1e-3",
        "--epochs",
        "1",
        "--trials",
        "1",
    )
    assert call(glue, tmp_path / "out", "--sets", "SST-2,CoLA,MRPC,STS-B", *options) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    ]
    assert {line["settings"]["data"] for line in lines} == {"SST-2", "CoLA", "MRPC", "STS-B"}
    assert all(line["settings"]["lr"] == 1e-3 for line in lines)
    assert "| uegr | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "value"),
    [
        ("accuracy", [[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]], [0, 1, 0], 2 / 3),
        (
            "matthews",
            [[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]],
            [0, 1, 0, 0],
            (1 * 2 - 1 * 0) / (2 * 1 * 3 * 2) ** 0.5,
        ),
        ("matthews", [[2.0, 1.0], [2.0, 1.0]], [0, 1], 0.0),
        ("correlation", [[1.0], [2.0], [3.0]], [1.0, 4.0, 9.0], (0.98974 + 1) / 2),
    ],
)
def test_metrics(metric, outputs, labels, value):
    assert training.score(torch.tensor(outputs), labels, metric) == pytest.approx(value, abs=1e-4)
