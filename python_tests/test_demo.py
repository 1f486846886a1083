"""The demo on tiny data: what it prints and writes, malformed files, Ctrl-C and going on
exactly; the models' indifference to padding.
"""

import contextlib
import gzip
import re
import signal
import subprocess
import sys

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.finetune import data as texts
from uegr_kernels.finetune import demo
from uegr_kernels.finetune import demo_training as train
from uegr_kernels.models import MODELS

STEPS = 6


@pytest.fixture
def sentences(tmp_path):
    """A file of 60 lines in which a word tells the label."""
    rows = [
        f"{('dog', 'cat')[i % 2]}\tthe {('barking', 'purring')[i % 2]} animal number {i} sat "
        '"there\tquietly'
        for i in range(60)
    ]
    path = tmp_path / "animals.tsv"
    path.write_text("label\ttext\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def arguments(data, output, *more):
    return ["--data", str(data), "--output", str(output), "--steps", str(STEPS), *more]


def checkpoint(output):
    return torch.load(output / demo.CHECKPOINT, weights_only=True)


def assert_same_run(one, other):
    assert one["settings"] == other["settings"]
    for arm in train.ARMS:
        a, b = one["arms"][arm], other["arms"][arm]
        assert [a[name] for name in ("step", "losses", "shares", "accuracy")] == [
            b[name] for name in ("step", "losses", "shares", "accuracy")
        ]
        assert (
            torch.equal(a["random"], b["random"])
            and len(a["seconds"]) == len(b["seconds"]) == STEPS
        )
        for name, value in a["model"].items():
            assert torch.equal(value, b["model"][name]), name
        for index, state in a["optimizer"]["state"].items():
            for name, value in state.items():
                assert torch.equal(value, b["optimizer"]["state"][index][name]), (index, name)


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_run(sentences, tmp_path, capfd, model):
    threads = torch.get_num_threads()
    assert (
        demo.main(
            arguments(
                sentences, tmp_path / "out", "--model", model, "--epsilon", "0.25", "--passes", "3"
            )
        )
        == 0
    )
    printed = capfd.readouterr()
    assert (
        "60 texts" in printed.out
        and "2 classes: cat, dog." in printed.out
        and "48 to train on, 12 to test." in printed.out
    )
    assert (
        "BiStage(epsilon=0.25, passes=3, js_weight=0.01)"
    ) in printed.out and "threshold=0.8" in printed.out
    rows = [
        line
        for line in printed.out.splitlines()
        if line.startswith(("accuracy", "seconds", "parameters"))
    ]
    assert len(rows) == 1 + len(train.ATTACKS) + 2 and all(len(row.split()) >= 3 for row in rows)
    assert f"{STEPS}/{STEPS}" in printed.err and "Warning" not in printed.err
    assert (tmp_path / "out" / demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [demo.CHECKPOINT, demo.PICTURE]
    )
    arms = checkpoint(tmp_path / "out")["arms"]
    assert 0.9 < arms["UEGR"]["shares"][0] < 1 and not arms["AdamW"]["shares"]
    assert torch.get_num_threads() == threads


def test_it_learns(sentences, tmp_path, capfd):
    assert demo.main(["--data", str(sentences), "--output", str(tmp_path), "--epochs", "15"]) == 0
    for state in checkpoint(tmp_path)["arms"].values():
        assert state["accuracy"][0] == 1.0 and state["losses"][-1] < state["losses"][0] / 2


def test_the_share_is_that_of_the_masks_of_the_step(sentences, tmp_path, capfd):
    """The first step's, drawn again from its seed on the gradient that the optimizer saw."""
    seen, step = [], uk.SelectiveAdamW.step
    whole = arguments(sentences, tmp_path, "--steps", "1")

    def watched(optimizer, *rest):
        group = optimizer.param_groups[0]
        seen.extend(
            uk.selection_mask(p.grad, seed=group["seed"], step=1, stream=i)
            for i, p in enumerate(group["params"])
        )
        return step(optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uk.SelectiveAdamW, "step", watched)
        assert demo.main(whole) == 0
    selected = sum(mask.sum().item() for mask in seen) / sum(mask.numel() for mask in seen)
    assert checkpoint(tmp_path)["arms"]["UEGR"]["shares"] == [selected]


def test_a_seed_fixes_the_run(sentences, tmp_path, capfd):
    for folder in "ab":
        assert demo.main(arguments(sentences, tmp_path / folder, "--seed", "5")) == 0
    assert demo.main(arguments(sentences, tmp_path / "c", "--seed", "6")) == 0
    a, b, c = (checkpoint(tmp_path / folder) for folder in "abc")
    assert_same_run(a, b)
    assert a["arms"]["UEGR"]["losses"] != c["arms"]["UEGR"]["losses"]


def test_gzip_carriage_returns_byte_order_mark_and_missing_header(sentences, tmp_path):
    expected = texts.read_tsv(str(sentences))
    text = sentences.read_bytes()
    variants = {
        "a.tsv.gz": gzip.compress(text),
        "b.tsv": text.replace(b"\n", b"\r\n"),
        "c.tsv": b"\xef\xbb\xbf" + text,
        "d.tsv": text.rstrip(b"\n"),
    }
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        assert texts.read_tsv(str(tmp_path / name)) == expected, name
    (tmp_path / "e.tsv").write_bytes(text.split(b"\n", 1)[1])
    assert [example[:2] for example in texts.read_tsv(str(tmp_path / "e.tsv"))] == [
        example[:2] for example in expected
    ]
    assert (
        expected[0].words == ("the", "barking", "animal", "number", "0", "sat", "there", "quietly")
        and expected[0].line == 2
    )


def test_a_test_file_of_ones_own(sentences, tmp_path, capfd):
    lines = sentences.read_text().splitlines(keepends=True)
    test = tmp_path / "test.tsv.gz"
    test.write_bytes(gzip.compress("".join(lines[1:11]).encode()))
    assert demo.main(arguments(sentences, tmp_path / "out", "--test", str(test))) == 0
    # the ten are out of the training
    assert "50 to train on, 10 to test." in capfd.readouterr().out
    test.write_bytes(gzip.compress(b"dog\tx\nhorse\tx\n"))
    assert demo.main(arguments(sentences, tmp_path / "out", "--test", str(test))) == 2
    assert "line 2: the label 'horse' does not occur" in capfd.readouterr().err
    assert demo.main(["--test", str(test)]) == 2
    assert "--test FILE needs --data FILE" in capfd.readouterr().err


@pytest.mark.parametrize(
    "content, text",
    [
        (b"a\tx\nb y\n", "line 2: no tab"),
        (b"a\tx\n\nb\ty\n", "line 2: no tab"),
        (b"label\ttext\na\tx\n \ty\n", "line 3: the label is empty"),
        (b"a\tx\nb\t \n", "line 2: the text is empty"),
        (b"a\tx\nb\tcaf\xe9\n", "line 2: not UTF-8"),
        (b"a\tx\na\ty\n", "line 2: every label .* is 'a'"),
        (b"", "line 1: the file ends without an example"),
        (b"label\ttext\n", "line 2: the file ends without an example"),
        (b"a\tx\nb\tx\n", "texts are left to train on"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_malformed_files(tmp_path, capfd, content, text, zipped):
    path = tmp_path / ("bad.tsv.gz" if zipped else "bad.tsv")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert demo.main(arguments(path, tmp_path / "out")) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert re.search(text, error), error


def test_files_that_cannot_be_read(sentences, tmp_path, capfd):
    not_gzip, cut = tmp_path / "a.gz", tmp_path / "b.gz"
    not_gzip.write_bytes(b"a\tx\n")
    cut.write_bytes(gzip.compress(sentences.read_bytes())[:-20])
    for path, text in (
        (tmp_path / "none.tsv", "No such file"),
        (tmp_path, "directory"),
        (not_gzip, "not a whole gzip"),
        (cut, "not a whole gzip"),
    ):
        assert demo.main(arguments(path, tmp_path / "out")) == 2
        error = capfd.readouterr().err
        assert text in error and str(path) in error and "Traceback" not in error
    assert demo.main(arguments(sentences, sentences)) == 2
    assert "--output" in capfd.readouterr().err


@pytest.mark.parametrize(
    "option, value",
    [
        ("--epochs", "0"),
        ("--steps", "-1"),
        ("--steps", "x"),
        ("--seed", "-1"),
        ("--epsilon", "nan"),
        ("--model", "bert"),
        ("--limit", "0"),
    ],
)
def test_wrong_options(option, value, capfd):
    assert demo.main([option, value]) == 2
    assert option in capfd.readouterr().err


def test_help(capfd):
    assert demo.main(["--help"]) == 0
    assert "--resume" in capfd.readouterr().out


class TestStopping:
    @pytest.mark.parametrize("arm, step", [("AdamW", 1), ("AdamW", STEPS), ("UEGR", 4)])
    def test_ctrl_c_and_resume_equal_a_run_that_was_not_interrupted(
        self, sentences, tmp_path, capfd, monkeypatch, arm, step
    ):
        whole = arguments(sentences, tmp_path / "whole")
        assert demo.main(whole) == 0
        rows = train.rows_of_step
        arms = []

        def interrupted(at, *rest):  # in the middle of a step
            if at == 0:
                arms.append(train.ARMS[len(arms)])
            if arms[-1] == arm and at == step - 1:
                signal.raise_signal(signal.SIGINT)
            return rows(at, *rest)

        monkeypatch.setattr(train, "rows_of_step", interrupted)
        assert demo.main(arguments(sentences, tmp_path / "out")) == 130
        error = capfd.readouterr().err
        assert (
            (f"Stopped in {arm} after step {step} of {STEPS}") in error
            and "--resume" in error
            and "Traceback" not in error
        )
        assert checkpoint(tmp_path / "out")["arms"][arm]["step"] == step
        monkeypatch.setattr(train, "rows_of_step", rows)
        assert demo.main(arguments(sentences, tmp_path / "out", "--resume")) == 0
        assert_same_run(checkpoint(tmp_path / "out"), checkpoint(tmp_path / "whole"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_kill_costs_no_more_than_the_steps_since_the_last_save(
        self, sentences, tmp_path, capfd, monkeypatch
    ):
        assert demo.main(arguments(sentences, tmp_path / "whole")) == 0
        monkeypatch.setattr(train, "SAVE_EVERY", 2)
        rows = train.rows_of_step

        def killed(step, *rest):
            if step == 5:
                raise MemoryError
            return rows(step, *rest)

        monkeypatch.setattr(train, "rows_of_step", killed)
        with pytest.raises(MemoryError):
            demo.main(arguments(sentences, tmp_path / "out"))
        assert checkpoint(tmp_path / "out")["arms"]["AdamW"]["step"] == 4
        monkeypatch.setattr(train, "rows_of_step", rows)
        assert demo.main(arguments(sentences, tmp_path / "out", "--resume")) == 0
        assert_same_run(checkpoint(tmp_path / "out"), checkpoint(tmp_path / "whole"))

    def test_a_second_ctrl_c_stops_at_once(self, sentences, tmp_path, capfd, monkeypatch):
        def twice(*arguments):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(train, "rows_of_step", twice)
        assert demo.main(arguments(sentences, tmp_path / "out")) == 130
        assert "Stopped at once" in capfd.readouterr().err

    def test_a_kill_within_a_save_leaves_a_whole_checkpoint(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        endless = (
            "import pathlib, sys, torch\n"
            "from uegr_kernels.finetune.demo_training import save_checkpoint\n"
            "i = 0\nwhile True:\n    weights = torch.full((1 << 20,), float(i))\n"
            "    save_checkpoint(pathlib.Path(sys.argv[1]), {'weights': weights})\n"
            "    print(i, flush=True)\n    i += 1"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", endless, str(path)], stdout=subprocess.PIPE
        )
        done = -1
        for done in range(3):
            assert int(process.stdout.readline()) == done
        within = path.with_suffix(".tmp")
        written = 0
        while not 0 < written < 1 << 22:  # part of the next one
            assert process.poll() is None
            with contextlib.suppress(FileNotFoundError):
                written = within.stat().st_size
        process.kill()
        process.wait()
        weights = torch.load(path, weights_only=True)["weights"]
        assert weights[0] >= done and bool((weights == weights[0]).all())

    def test_resume_refuses_another_run(self, sentences, tmp_path, capfd):
        out = tmp_path / "out"
        assert demo.main(arguments(sentences, out, "--resume")) == 2
        assert "there is no" in capfd.readouterr().err
        assert demo.main(arguments(sentences, out)) == 0
        finished = capfd.readouterr().out
        for more, text in (
            (("--seed", "3"), "--seed is 3 here and 0 there"),
            (("--epsilon", "1"), "--epsilon"),
            (("--limit", "30"), "fingerprint"),
        ):
            assert demo.main(arguments(sentences, out, "--resume", *more)) == 2
            assert text in capfd.readouterr().err
        # a finished run is shown again
        assert demo.main(arguments(sentences, out, "--resume")) == 0
        assert capfd.readouterr().out.split("\n\n")[1] == finished.split("\n\n")[1]
        (out / demo.CHECKPOINT).write_bytes(b"PK what")
        assert demo.main(arguments(sentences, out, "--resume")) == 2
        assert "is not a checkpoint of this demo" in capfd.readouterr().err

    def test_a_signal_from_outside(self, sentences, tmp_path):
        command = [
            sys.executable,
            "-m",
            "uegr_kernels",
            "demo",
            "--data",
            str(sentences),
            "--output",
            str(tmp_path / "out"),
            "--epochs",
            "5000",
        ]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for line in process.stderr:  # universal newlines: every state of the bar is a line
            if "step/s" in line and "loss" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130 and "Stopped in AdamW" in rest and "Traceback" not in rest
        assert 0 < checkpoint(tmp_path / "out")["arms"]["AdamW"]["step"] < 10_000


class TestData:
    def test_docstrings(self, monkeypatch):
        monkeypatch.setattr(texts, "PER_PACKAGE", 20)
        monkeypatch.setattr(texts, "FEWEST", 10)
        monkeypatch.setattr(texts, "PACKAGES", 4)
        examples = texts.read_docstrings(lambda names, **options: names)
        assert len({example.label for example in examples}) == 4 and len(examples) == 80
        assert len({example.words for example in examples}) == 80
        assert not any(
            word in ("numpy", "np", "torch", "python", "pytest")
            for example in examples
            for word in example.words
        )
        assert texts.read_docstrings(lambda names, **options: names) == examples

    def test_equal_texts_stay_on_one_side(self):
        examples = [texts.Example("ab"[i % 2], (f"word{i // 4}", "same"), i) for i in range(80)]
        data = texts.prepare(examples, None, None, 64)
        train, test = (
            {tuple(row) for row in texts.ids.tolist()} for texts in (data.train, data.test)
        )
        assert len(data.train.labels) + len(data.test.labels) == 80 and len(data.test.labels) == 16
        assert len(train) == 16 and train.isdisjoint(test)

    def test_limit_and_length(self):
        examples = [texts.Example("ab"[i % 2], ("one", "two", f"{i}"), i) for i in range(100)]
        data = texts.prepare(examples, None, 50, 3)
        assert len(data.train.labels) + len(data.test.labels) == 50
        assert texts.prepare(
            examples, [texts.Example("a", ("new", "one", "two"))], 50, 2
        ).test.ids.shape == (1, 2)

    def test_chinese_words_are_characters(self):
        assert texts.words_of("学习 PyTorch_2很快!") == ("学", "习", "pytorch", "2", "很", "快")

    def test_each_epoch_visits_every_text_once(self):
        epochs = [
            torch.cat([train.rows_of_step(4 * epoch + i, 100, seed=1) for i in range(4)])
            for epoch in range(2)
        ]
        assert all(sorted(rows.tolist()) == list(range(100)) for rows in epochs)
        assert not torch.equal(*epochs)


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
