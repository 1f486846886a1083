"""The demo: a call of `finetune` with defaults of its own; the docstrings it reads; that the small
models do not read padding.
"""

import re

import pytest
import torch

from uegr_kernels.finetune import data, demo
from uegr_kernels.models import MODELS

pytest.importorskip("transformers")
QUICK = ["--model", "textcnn", "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def sentences(tmp_path):
    """A file of 60 lines in which a word tells the label."""
    rows = [
        f"{('dog', 'cat')[i % 2]}\tthe {('barking', 'purring')[i % 2]} animal number {i} sat there"
        for i in range(60)
    ]
    path = tmp_path / "animals.tsv"
    path.write_text("label\ttext\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def few_docstrings(monkeypatch):
    monkeypatch.setattr(demo, "MANY", (3, 20))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_compares_adamw_with_uegr_on_docstrings(few_docstrings, tmp_path, capsys):
    out = tmp_path / "out"
    assert demo.main([*QUICK, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| +\| +plain \| +uegr \|", printed) and "under PGD at 0.05" in printed
    assert f"{out / 'models' / 'report.png'}\n" in printed and "\nTime: " in printed
    assert {"docstrings.tsv", "models/report.png", "models/report.md"} <= files(out)
    lines = (out / "docstrings.tsv").read_text().splitlines()
    assert len(lines) == 61 and len({line.split("\t")[0] for line in lines[1:]}) == 3


def test_a_file_of_ones_own_and_options_of_the_command(sentences, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--train", str(sentences), "--recipe", "at", "--seed", "3", "--output", str(out)]
    assert demo.main([*QUICK, *arguments]) == 0
    assert "`at`: " in capsys.readouterr().out
    assert "docstrings.tsv" not in files(out)
    before = (out / "models" / "model.safetensors").read_bytes()
    # what is finished stays
    assert demo.main([*QUICK, *arguments, "--resume"]) == 0
    # begun anew, the same seed
    assert demo.main([*QUICK, *arguments]) == 0
    assert (out / "models" / "model.safetensors").read_bytes() == before


def test_without_the_pretrained_model_s_package(few_docstrings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MINILM", "a_package_that_is_not_there")
    assert demo.main(["--epochs", "1", "--output", str(tmp_path / "out")]) == 0
    assert 'pip install "uegr-kernels[lm]"): TextCNN is taken' in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, expected",
    [
        ("minilm", {"epochs": 2.0, "lr": 2e-4, "length": 48}),
        ("textcnn", {"epochs": 5.0, "lr": None, "length": 64}),
    ],
)
def test_each_kind_of_model_has_settings_of_its_own(sentences, monkeypatch, model, expected):
    asked = []
    monkeypatch.setattr(demo.command, "run", lambda options, again: asked.append(options) or 2)
    assert demo.main(["--train", str(sentences), "--model", model]) == 2
    assert vars(asked[0]).items() >= expected.items()
    assert demo.main(["--train", str(sentences), "--model", model, "--lr", "0.5"]) == 2
    assert asked[1].lr == 0.5


def test_the_demo_says_why_it_is_slow(sentences, tmp_path, capsys):
    arguments = ["--train", str(sentences), "--output", str(tmp_path / "out")]
    assert demo.main([*QUICK, *arguments], lambda: "no compiler was found") == 0
    assert "many times slower: no compiler was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train", "none.tsv"], "none.tsv cannot be read"),
        (["--train", "none.tsv", "--model", "./nothing"], "none.tsv cannot be read"),
        (["--resume", "--train", "none.tsv"], "none.tsv"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert demo.main([*QUICK, *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_output_s_place_may_not_be_a_file(sentences, capsys):
    arguments = ["--train", str(sentences), "--output", str(sentences)]
    assert demo.main([*QUICK, *arguments]) == 2
    assert "--output" in capsys.readouterr().err
    assert demo.main([*QUICK, "--output", str(sentences)]) == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--help"])
    assert end.value.code == 0 and "--resume" in capsys.readouterr().out


@pytest.fixture(scope="module")
def docstrings():
    return data.read_docstrings(4, 20, lambda names, **options: names)


def test_docstrings_do_not_name_their_package(docstrings):
    assert len({label for label, _ in docstrings}) == 4 and len(docstrings) == 80
    assert len({text for _, text in docstrings}) == 80
    words = {word for _, text in docstrings for word in text.split()}
    assert not words & {"numpy", "np", "torch", "python", "pytest"}


def test_docstrings_are_the_same_each_time(docstrings):
    assert data.read_docstrings(4, 20, lambda names, **options: names) == docstrings


def test_chinese_words_are_characters():
    assert data.words_of("学习 PyTorch_2很快!") == ("学", "习", "pytorch", "2", "很", "快")


@pytest.mark.parametrize("name", MODELS)
def test_models_do_not_read_padding(name):
    model = MODELS[name](50, 3).double().eval()
    ids = torch.randint(1, 50, (4, 20))
    ids[1, 7:], ids[2, 1:], ids[3] = 0, 0, 0
    logits = model(ids)
    assert logits.shape == (4, 3) and logits.isfinite().all()
    torch.testing.assert_close(model(torch.nn.functional.pad(ids, (0, 23))), logits)
    torch.testing.assert_close(model(ids[1:2, :7]), logits[1:2])
    torch.testing.assert_close(model(ids, attention_mask=ids != 0), logits)
    torch.testing.assert_close(model.classify(model.embedding(ids), ids != 0), logits)
