"""The command end to end on a small BERT and on TextCNN: models, reports, going on, refusals."""

import contextlib
import inspect
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest
import torch

from uegr_kernels import recipes
from uegr_kernels.finetune import UserError, command, finetune, measures, task
from uegr_kernels.finetune.classifiers import load
from uegr_kernels.finetune.tables import Columns, read
from uegr_kernels.recipes import RECIPES

from .conftest import SMALL, WORDS, run, strict, texts, tsv

pytest.importorskip("transformers")

from uegr_kernels.finetune import train as finetuning

ROOT = pathlib.Path(__file__).parents[2]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_recipe_gives_a_model_that_transformers_loads(train, bert, tmp_path, capsys):
    from transformers import pipeline

    out = tmp_path / "out"
    assert run("--train", train, "--model", bert, "--lr", 5e-3, "--output", out) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.md", "report.json"} <= {
        file.name for file in out.iterdir()
    }
    assert not (out / "checkpoints").exists()
    answer = pipeline("text-classification", str(out))("good fine fast film p")
    assert answer[0]["label"] in WORDS
    report = (out / "report.md").read_text()
    for said in ("clean", "under FGM at 0.01", "under PGD at 0.05", "typos in 5 %", "calibration"):
        assert said in report
    assert report in capsys.readouterr().out
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_compares_recipes_and_seeds(train, tmp_path):
    out, other = tmp_path / "out", tsv(tmp_path / "other.tsv", texts(20, 5))
    arguments = ["--train", train, "--model", "textcnn", "--lr", 1e-2, "--compare", "plain,uegr"]
    arguments += ["--seeds", 2, "--shifted", f"twin={other}", "--ood", f"far={other}"]
    assert run(*arguments, "--output", out) == 0
    found = json.loads((out / "report.json").read_text())
    assert {(each["recipe"], each["seed"]) for each in found["runs"]} == {
        (recipe, seed) for recipe in ("plain", "uegr") for seed in (0, 1)
    }
    names = [each["name"] for each in found["measures"]]
    assert "on twin" in names and "AUROC against far" in names
    for measure in found["measures"]:
        for figure in measure["figures"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert "times the seconds a step" in found["sentence"]
    again = load(out / "uegr" / "1")
    inputs = again.pad(again.encode([("good film",)]))
    assert again.model.eval()(**inputs).shape == (1, 2)


def test_regression_and_pairs(tmp_path, bert):
    rows = [(f"{i % 5}.5", f"good film ||| {'bad ' * (i % 5)}so {i}") for i in range(50)]
    out, file = tmp_path / "out", tsv(tmp_path / "pairs.tsv", rows)
    arguments = ["--regression", "--pair-separator", "|||", "--compare", "plain,uegr"]
    assert run("--train", file, "--model", bert, *arguments, "--output", out) == 0
    names = [each["name"] for each in strict(out)["measures"]]
    assert names[0] == "correlation, clean" and not any("PGD" in name for name in names)
    report = (out / "report.md").read_text()
    assert "ttack" not in report and "points" not in report
    assert "A constant prediction has a correlation of 0." in report


def test_a_bug_in_training_keeps_its_traceback(train, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(RECIPES["at"], "_backward", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("--train", train, "--model", "textcnn", "--recipe", "at", "--output", tmp_path / "out")


def test_ctrl_c_before_training_and_after_it(train, tmp_path, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    arguments = ["--train", train, "--model", "textcnn", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(task.tables, "load", pressed)
        assert run(*arguments) == 130
    assert capsys.readouterr().err == "\nStopped; nothing is trained yet.\n"
    with monkeypatch.context() as patch:
        patch.setattr(measures, "measure", pressed)
        assert run(*arguments) == 130
    assert "Stopped; what is done is kept. Go on with" in capsys.readouterr().err
    assert run(*arguments, "--resume") == 0


def test_ctrl_c_during_the_imports():
    code = "import _thread, sys\n" + textwrap.dedent("""
        class Pressed:
            def find_spec(self, name, *_):
                if name == "transformers":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Pressed())
        from uegr_kernels.__main__ import main
        sys.exit(main(["finetune", "--train", "a.tsv", "--output", "b"]))
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nStopped; nothing is trained yet.\n")


@pytest.mark.parametrize("name", ["uegr_kernels", "other"])
def test_ctrl_c_while_torch_is_imported(tmp_path, name):
    # Python imports the package before its __main__; another package's Ctrl-C is its own affair
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nraise SystemExit(1)")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import uegr_kernels")
    done = subprocess.run(
        [sys.executable, "-m", name, "info"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    if name == "other":
        assert "KeyboardInterrupt" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (130, "\nStopped; nothing is done yet.\n")


@pytest.mark.parametrize("recipe", recipes.NAMES)
def test_every_recipe(train, tmp_path, recipe):
    out = tmp_path / "out"
    more = ["--trainer-options", "max_steps=2", "eval_strategy=steps", "eval_steps=2"]
    more += ["save_strategy=steps", "save_steps=2"]
    assert (
        run("--train", train, "--model", "textcnn", "--recipe", recipe, *more, "--output", out) == 0
    )


@pytest.mark.parametrize("model", ["bert", "textcnn"])
# in the first epoch, at its end (6 steps), in the second
@pytest.mark.parametrize("after", [1, 6, 8])
def test_a_stopped_run_goes_on_exactly(train, bert, tmp_path, monkeypatch, model, after, capsys):
    arguments = ["--train", train, "--model", bert if model == "bert" else model, "--lr", 5e-3]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(*arguments, "--output", whole) == 0
    steps = []

    class Pressed:
        def __enter__(self):
            return lambda: steps.append(1) or len(steps) == after

        def __exit__(self, *_):
            return None

    with monkeypatch.context() as patch:
        patch.setattr(task, "interrupts_noticed", Pressed)
        assert run(*arguments, "--output", parted) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (parted / "report.md").exists()
    # the last step's too, wherever the best epoch is
    assert (parted / "checkpoints" / f"checkpoint-{after}").is_dir()
    assert run(*arguments, "--output", parted, "--resume") == 0
    assert same(whole, parted)
    first, second = (
        json.loads((folder / "report.json").read_text())["runs"][0] for folder in (whole, parted)
    )
    assert first["outcomes"] == second["outcomes"] and first["best_epoch"] == second["best_epoch"]


class Killed(Exception):
    """Stands for a kill -9: nothing of the run is put in order after it."""


@pytest.mark.long
@pytest.mark.parametrize("written", ["nothing of it", "all but its state"])
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    train, tmp_path, monkeypatch, written
):
    from transformers import TrainerState

    arguments = ["--train", train, "--model", "textcnn", "--lr", 5e-3]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(*arguments, "--output", whole) == 0
    save, saved = TrainerState.save_to_json, []

    def killed(state, path):
        saved.append(path)
        if len(saved) == 2:
            if written == "nothing of it":
                for file in pathlib.Path(path).parent.iterdir():
                    file.unlink()
            else:
                pathlib.Path(path).write_text('{"cut')
            raise Killed
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainerState, "save_to_json", killed)
        run(*arguments, "--output", parted)
    assert len(list(parted.glob("checkpoints/checkpoint-*"))) == 2
    assert run(*arguments, "--output", parted, "--resume") == 0
    assert same(whole, parted)


def test_a_run_killed_after_its_last_step_ends_as_it_would_have(train, tmp_path, monkeypatch):
    arguments = ["--train", train, "--model", "textcnn", "--lr", 5e-3]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(*arguments, "--output", whole) == 0

    # where the checkpoints are to go, after the last of them
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetuning, "shutil", types.SimpleNamespace(rmtree=killed))
        run(*arguments, "--output", parted)
    assert run(*arguments, "--output", parted, "--resume") == 0
    assert same(whole, parted)


@pytest.mark.parametrize("recipe", ["child_tuning_d", "roast"])
def test_a_recipe_that_looks_at_the_texts_first_sees_them_all(train, tmp_path, monkeypatch, recipe):
    seen, prepare = [], RECIPES[recipe].prepare

    def watched(self, batches):
        batches = list(batches)
        seen.append(sum(len(labels) for _, labels in batches))
        prepare(self, batches)

    monkeypatch.setattr(RECIPES[recipe], "prepare", watched)
    arguments = ["--train", train, "--model", "textcnn", "--recipe", recipe]
    assert run(*arguments, "--output", tmp_path / "out") == 0
    trained_on = re.search(r"(\d+) texts to train on", (tmp_path / "out" / "report.md").read_text())
    assert seen == [int(trained_on[1])] and seen[0] > 40


@pytest.mark.long
def test_ctrl_c_leaves_a_checkpoint(train, tmp_path):
    out = tmp_path / "out"
    arguments = ["--train", train, "--model", "textcnn", "--epochs", "400", "--device", "cpu"]
    code = (
        "import sys; from uegr_kernels.finetune.command import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), "--output", str(out)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not any(out.glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Stopped; what is done is kept" in said and "Traceback" not in said
    assert any(out.glob("checkpoints/checkpoint-*"))


def test_changed_arguments_are_refused_by_name(train, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--train", train, "--model", "textcnn", "--recipe", "plain", "--output", out]
    assert run(*arguments) == 0
    assert run(*arguments) == 2
    assert "holds a fine-tuning; add --resume" in capsys.readouterr().err
    assert run(*arguments, "--resume", "--lr", 5e-5) == 2
    assert "--resume: lr is 5e-05 now and was 0.001;" in capsys.readouterr().err
    assert run(*arguments, "--resume", "--ood", f"far={train}") == 2
    assert "--resume: --ood far was not given then;" in capsys.readouterr().err
    train.write_text(train.read_text() + "pos\tgood new text\n")
    assert run(*arguments, "--resume") == 2
    assert f"--resume: the content of --train {train} has changed;" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_asked_for(train, tmp_path):
    with pytest.raises(UserError, match="device 'cuda': there is no GPU"):
        finetune(train, tmp_path / "out", model="textcnn", device="cuda")


@pytest.mark.parametrize("content", ["[]", "{", '{"files": {}, "recipes": [".."], "seeds": [0]}'])
@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_settings_that_are_none(train, tmp_path, capsys, content, option):
    out = tmp_path / "out"
    out.mkdir()
    (out / "uegr_finetune.json").write_text(content)
    assert run("--train", train, "--model", "textcnn", "--output", out, option) == 2
    said = "holds no fine-tuning" if option == "--resume" else "none of a fine-tuning's"
    assert said in capsys.readouterr().err
    assert (out / "uegr_finetune.json").read_text() == content


def test_an_output_that_is_no_folder(train, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for out, said in ((tmp_path / "link", "is a link to nothing"), (train, "is a file; name")):
        assert run("--train", train, "--model", "textcnn", "--output", out) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    (tmp_path / "through").symlink_to(tmp_path / "there")
    assert run("--train", train, "--model", "textcnn", "--output", tmp_path / "through") == 0
    assert (tmp_path / "there" / "report.md").exists()


def test_what_overwriting_would_remove_is_not_read(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run("--train", train, "--model", "textcnn", "--compare", "plain,at", "--output", out) == 0
    )
    inside = out / "at" / "0" / "train.tsv"
    inside.write_text(train.read_text())
    arguments = ["--model", "textcnn", "--output", out, "--overwrite"]
    assert run("--train", inside, *arguments) == 2
    assert f"--train {inside} is or lies in {out / 'at' / '0'}" in capsys.readouterr().err
    assert inside.exists() and (out / "plain" / "0" / "model.safetensors").exists()


def test_a_model_s_folder_that_changed_is_noticed(train, bert, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(bert, model)
    arguments = ["--train", train, "--model", model, "--recipe", "plain"]
    assert run(*arguments, "--output", model) == 2
    assert f"--model {model} is or lies in {model}" in capsys.readouterr().err
    assert run(*arguments, "--output", out) == 0
    assert run(*arguments, "--output", out, "--resume") == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.2}))
    assert run(*arguments, "--output", out, "--resume") == 2
    assert f"--resume: the content of --model {model} has changed;" in capsys.readouterr().err


def test_overwriting_leaves_what_others_wrote(train, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", "textcnn", "--output", out]
    assert run("--train", train, "--compare", "plain,at", *arguments) == 0
    inside = out / "plain" / "reviews.tsv"
    inside.write_text(train.read_text())
    (out / "thesis.txt").write_text("years of work")
    assert run("--train", inside, "--recipe", "plain", *arguments, "--overwrite") == 0
    assert inside.exists() and (out / "thesis.txt").read_text() == "years of work"
    assert not (out / "at").exists() and not (out / "plain" / "0").exists()
    settings = out / "settings.json"
    # an editor's would be taken for ours
    assert not settings.exists()


@pytest.mark.parametrize("after", [["--recipe", "plain"], ["--compare", "plain,at"], ["diverged"]])
def test_overwriting_leaves_no_file_of_the_model_before(train, bert, tmp_path, after):
    out = tmp_path / "out"
    arguments = ["--train", train, "--output", out]
    assert run(*arguments, "--recipe", "plain", "--model", bert) == 0
    (out / "notes.json").write_text("{}")
    small = [*arguments, "--overwrite", "--model", "textcnn"]
    kept = {"notes.json", "report.json", "report.md", "uegr_finetune.json"}
    if after == ["diverged"]:
        assert run(*small, "--recipe", "plain", "--lr", "1e30") == 1
        assert {each.name for each in out.iterdir()} == {*kept, "uegr_outcomes.json"}
    elif "--compare" in after:
        assert run(*small, *after) == 0
        assert {each.name for each in out.iterdir()} == {*kept, "report.png", "plain", "at"}
    else:
        assert run(*small, *after) == 0
        # Transformers would read TextCNN's weights by it
        assert not (out / "config.json").exists()
        arguments += ["--overwrite", "--model", bert]
        assert run(*arguments, *after) == 0
        assert load(out).model.config.model_type == "bert"


@pytest.mark.parametrize("content", ["3", "{", '["../train.tsv", "plain", "..", 4, ""]'])
def test_overwriting_removes_nothing_outside(train, tmp_path, content):
    out = tmp_path / "out"
    arguments = ["--train", train, "--model", "textcnn", "--recipe", "plain", "--output", out]
    assert run(*arguments) == 0
    (out / "uegr_model.json").write_text(content)
    assert run(*arguments, "--overwrite") == 0
    assert train.exists()


def test_attacked_texts_are_of_both_labels_where_a_file_is_sorted(train, tmp_path, monkeypatch):
    test = tsv(tmp_path / "sorted.tsv", sorted({*texts(400, 9)}))
    whole, asked = read(test, Columns()), []

    def seen(classifier, attack, strengths, examples, labels):
        asked.append(examples)
        return [torch.ones(len(examples), dtype=int)] * len(strengths)

    monkeypatch.setattr(measures, "predicted_under", seen)
    arguments = ["--model", "textcnn", "--test", test, "--output", tmp_path / "out"]
    assert run("--train", train, *arguments) == 0
    assert len(asked) == 2 and len(asked[0]) == 100 < len(whole)
    assert 30 < sum(example.label == "pos" for example in asked[0]) < 70


def test_sets_and_options_may_be_named_one_by_one(train, tmp_path):
    out = tmp_path / "out"
    arguments = ["--shifted", f"a$x_y_z$={train}", "--shifted", f"b={train}"]
    arguments += ["--recipe-options", "passes=3", "--recipe-options", "js_weight=0.1"]
    assert run("--train", train, "--model", "textcnn", *arguments, "--output", out) == 0
    names = [each["name"] for each in json.loads((out / "report.json").read_text())["measures"]]
    assert "on a$x_y_z$" in names and "on b" in names
    settings = json.loads((out / "uegr_finetune.json").read_text())
    assert settings["recipe_options"] == {"passes": 3, "js_weight": 0.1}


MISTAKES = {
    "a misspelt recipe": (["--recipe", "R-AT-SU"], "'arat'; 'r_at_su' is near"),
    "a missing name": (["--compare", "plain,,at"], "compare='plain,,at' has an empty name"),
    "a misspelt recipe option": (["--recipe-options", "pases=3"], "; 'passes' is near"),
    "a space around the sign": (["--recipe-options", "passes", "=", "3"], "without spaces around"),
    "options with a comma": (
        ["--recipe-options", "scope=x,passes=3"],
        "--recipe-options scope=x,passes=3: a comma stands between options; write a space",
    ),
    "a misspelt model": (["--model", "TextCNN"], "transformer; 'textcnn' is near"),
    "a folder of texts": (["--test", "."], ". is a folder; name a file"),
    "no such recipe": (["--recipe", "adam"], "recipe='adam' is not one of its values; use 'plain'"),
    "no such recipe of several": (["--compare", "plain,x"], "recipe='x' is not one of its values"),
    "no such model": (["--model", "./nothing"], "--model ./nothing: there is no such folder"),
    "a hub name without a network": (["--model", "some/model"], "neither here nor to be had"),
    "no such recipe option": (["--recipe-options", "speed=3"], "speed"),
    "a wrong recipe option": (["--recipe-options", "passes=0"], "passes=0"),
    "no such trainer option": (["--trainer-options", "speed=3"], "speed"),
    "a backend that is not there": (
        ["--recipe-options", "backend=cuda"],
        "recipe_options backend='cuda': its kernels run on cuda tensors, these are on cpu; ",
    ),
    "parts of a model": (
        ["--trainer-options", "fsdp=full_shard"],
        "trainer_options fsdp='full_shard': the command trains whole models, one on each of",
    ),
    "no pair": (["--recipe-options", "passes"], "--recipe-options passes: write NAME=VALUE"),
    "a set without a name": (["--shifted", "a.tsv"], "--shifted a.tsv: write NAME=FILE"),
    "several recipes for one": (["--recipe", "plain,at"], "'plain,at' is one recipe; several are"),
    "a name twice": (["--ood", "a=b", "a=c"], "'a' is given twice"),
    "what the command says itself": (
        ["--trainer-options", "output_dir=x"],
        "'output_dir' is set by",
    ),
    "no evaluation": (
        ["--trainer-options", "eval_strategy=no", "save_strategy=no"],
        "eval_strategy='no', save_strategy='no': the best checkpoint is kept by its score",
    ),
    "evaluations without checkpoints": (
        ["--trainer-options", "eval_strategy=steps"],
        "eval_strategy='steps', save_strategy='epoch': the best checkpoint",
    ),
    "a word for a number": (
        ["--trainer-options", "learning_rate=abc"],
        "trainer_options learning_rate='abc' is a str; give a float",
    ),
    "a word for a flag": (["--trainer-options", "bf16=yes"], "bf16='yes' is a str; give a bool"),
    "no best model": (
        ["--trainer-options", "load_best_model_at_end=False"],
        "'load_best_model_at_end' is set by the command; leave it out",
    ),
    "a secret that would be written down": (
        ["--trainer-options", "hub_token=x"],
        "'hub_token' is set by the command; leave it out",
    ),
    "fewer checkpoints": (
        ["--trainer-options", "save_total_limit=1"],
        "'save_total_limit' is set by the command; leave it out",
    ),
    "a seed of the Trainer's": (
        ["--trainer-options", "seed=3"],
        "'seed' is set by the command; us",
    ),
    "a misspelt trainer option": (["--trainer-options", "max_step=3"], "'max_steps' is near"),
    "an optimizer's package": (["--trainer-options", "optim=galore_adamw"], "galore"),
    "no texts a step": (["--trainer-options", "per_device_train_batch_size=0"], "batch_size=0 is"),
    "no accumulation": (
        ["--trainer-options", "gradient_accumulation_steps=0"],
        "trainer_options gradient_accumulation_steps=0 is out of range",
    ),
    "no steps": (["--trainer-options", "max_steps=0"], "trainer_options max_steps=0 is out of"),
    "no such schedule": (["--trainer-options", "lr_scheduler_type=flat"], "flat"),
    "to begin anew and to go on": (
        ["--overwrite", "--resume"],
        "give one of --overwrite, --resume",
    ),
    "foreign texts of a regression": (
        ["--regression", "--ood", "o=none.tsv"],
        "ood o: foreign texts are told by the confidence, and a regression has none",
    ),
    "a column twice": (["--text-column", "text,text"], "one column is named twice"),
    "a separator of nothing": (["--pair-separator", ""], "pair_separator '' parts nothing"),
    "no such file": (["--test", "none.tsv"], "none.tsv cannot be read"),
    "three columns": (["--text-column", "a,b,c"], "text_column a,b,c: name one column"),
    "no such column": (["--text-column", "body"], "no column is called 'body'"),
}


WORDS_WITHOUT_PLACE = {
    "a space for a comma": (["--compare", "plain", "at"], "write --compare plain,at ("),
    "a space after the comma": (["--text-column", "a,", "b"], "write --text-column a,b ("),
    "a space in a name": (["--train", "my", "texts.csv"], "'texts.csv' is one value too many; put"),
    "no name": (["texts.csv", "--train", "a.csv"], "write --train texts.csv ("),
    "another spelling": (["--text_column=a"], "no argument --text_column; '--text-column' is near"),
    "a longer name": (["--batch-size", "8"], "no argument --batch-size; '--batch' is near"),
    "another program's name": (["--learning-rate", "1"], "--learning-rate; it is --lr here"),
    "a comma in a number": (["--lr", "0,1"], "argument --lr: '0,1' is no number; give one in"),
    "numbers of seeds": (["--seeds", "0,1"], "argument --seeds: '0,1' is no integer; give one"),
}


@pytest.mark.parametrize("case", WORDS_WITHOUT_PLACE)
def test_arguments_without_a_place_are_answered_with_a_remedy(case, capsys):
    arguments, message = WORDS_WITHOUT_PLACE[case]
    assert command.main([*arguments, "--train=a.csv", "--output=b"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_models_that_cannot_be_read(train, bert, tmp_path, capsys):
    for broken in ("weights", "tokenizer"):
        shutil.copytree(bert, tmp_path / broken)
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"{}")
    for file in (tmp_path / "tokenizer").glob("*tok*"):
        file.unlink()
    # Transformers makes an empty one
    (tmp_path / "tokenizer" / "vocab.txt").unlink()
    for model, said in (
        (tmp_path / "weights", "holds no model that Transformers can load ("),
        (tmp_path / "tokenizer", "its tokenizer knows none of the texts' words; where"),
        (bert / "config.json", "config.json is a file; name the folder that it lies in"),
    ):
        assert run("--train", train, "--model", model, "--output", tmp_path / "out") == 2
        assert f"error: --model {model}" in (err := capsys.readouterr().err) and said in err
    assert not (tmp_path / "out").exists()


def test_where_model_and_report_lie_is_said_and_how_to_use_them(train, bert, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--train", train, "--model", bert, "--recipe", "plain", "--output", out) == 0
    said = capsys.readouterr().out
    assert f"\nModel: {out}\nReport: {out / 'report.md'}, {out / 'report.json'}, " in said
    used = re.findall("^  (.*)$", said, re.MULTILINE)[-2:]
    names: dict = {}
    exec(f"{used[0]}\nanswer = {used[1]}", names)
    assert names["answer"][0]["label"] in WORDS
    small = ["--model", "textcnn", "--compare", "plain,at", "--overwrite"]
    assert run("--train", train, *small, "--output", out) == 0
    said = capsys.readouterr().out
    assert f"\nModels: {out / 'plain' / '0'}, {out / 'at' / '0'}\n" in said
    used = re.findall("^  (.*)$", said, re.MULTILINE)[-4:]
    exec("\n".join([*used[:3], f"answer = {used[3]}"]), names)
    assert names["answer"].shape == (1, 2)


def test_help_names_what_may_be_given(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in (*recipes.NAMES, "textcnn", "(default: uegr)"))
    assert "(default: 0)" in said and not re.search(r"default: (None|False|\[)", said)


def test_a_warning_is_a_line(train, tmp_path):
    # in a process of its own: pytest takes warnings away; without two of the benchmarks' peers,
    # which other libraries import where they find them, and which may say on stderr that they do
    # not load
    arguments = ["--train", train, "--test", train, "--model", "textcnn"]
    code = (
        "import sys; sys.modules |= {'bitsandbytes': None, 'torchao': None}; "
        "from uegr_kernels.finetune import command, task; "
        "task._start = lambda *_: sys.exit(3); command.main(sys.argv[1:])"
    )
    given = [str(each) for each in (*arguments, "--output", tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3 and done.stderr.splitlines() == [
        f"warning: --test {train} is the file of --train too: what is reported should not have "
        "been trained on, nor chosen by; name another, or leave it out"
    ]


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(train, tmp_path, capsys, monkeypatch, case):
    # what HF_HUB_OFFLINE=1 sets when the hub's package is imported: no waiting for a network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments, message = MISTAKES[case]
    out = tmp_path / "out"
    assert run("--train", train, "--model", "textcnn", *arguments, "--output", out) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and "Traceback" not in said
    assert not out.exists()


def test_the_function_takes_the_command_s_arguments(train, tmp_path):
    options = {"model": "textcnn", "epochs": 2, "lr": 1e-2, "device": "cpu", "seeds": 2}
    # uegr's and r_drop's
    options |= {"recipe_options": {"passes": 3, "alpha": 2.0}}
    found = finetune(train, tmp_path / "out", compare=["r_drop", "uegr"], **options)
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(run["recipe"], run["seed"]) for run in found["runs"]] == [
        (recipe, seed) for seed in (0, 1) for recipe in ("r_drop", "uegr")
    ]
    settings = json.loads((tmp_path / "out" / "uegr_finetune.json").read_text())
    assert settings["recipe_options"] == options["recipe_options"]


def test_the_function_s_arguments_and_defaults_are_the_command_s():
    defaults = vars(command.parser().parse_args(["--train=a", "--output=b"]))
    parameters = inspect.signature(finetune).parameters
    assert parameters.keys() - {"command"} == defaults.keys()
    for name, default in defaults.items():
        if name not in ("train", "output"):
            assert (parameters[name].default or None) == (default or None), name


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"batch": 0}, ValueError, "batch=0 is out of range"),
        ({"lr": "fast"}, TypeError, "lr='fast' is a str; give a number"),
        ({"epochs": 0.0}, ValueError, "epochs=0.0"),
        ({"epsilon": -1}, ValueError, "epsilon=-1"),
        ({"seed": 1.5}, TypeError, "seed=1.5"),
        ({"seeds": 0}, ValueError, "seeds=0"),
        ({"length": 1}, ValueError, "length=1"),
        ({"limit": 1}, ValueError, "limit=1"),
        ({"device": "tpu"}, ValueError, "device='tpu'"),
        ({"trainer_options": {"output_dir": "x"}}, UserError, "'output_dir' is set by"),
        ({"regression": "no"}, TypeError, "regression='no'"),
        ({"overwrite": 1}, TypeError, "overwrite=1"),
        ({"compare": ["plain", 3]}, TypeError, "compare=['plain', 3] is a list; give recipes as"),
        ({"compare": 3}, TypeError, "compare=3 is a int; give recipes as a list of strings"),
        ({"compare": []}, UserError, "compare names no recipe"),
        ({"recipe": None}, TypeError, "recipe=None is a NoneType; give a string"),
        ({"recipe": ["plain"]}, TypeError, "recipe=['plain'] is a list; give a string"),
        ({"model": ["textcnn"]}, TypeError, "model=['textcnn'] is a list; give a path"),
        ({"command": 3}, TypeError, "command=3 is a int; give a string"),
        ({"shifted": "a.csv"}, TypeError, "shifted='a.csv' is a str; give a dict"),
        ({"shifted": {"x": None}}, TypeError, "shifted x=None is a NoneType; give a path"),
        ({"ood": ["a.csv"]}, TypeError, "ood=['a.csv'] is a list; give a dict"),
        ({"ood": {3: "a.csv"}}, TypeError, "ood={3: 'a.csv'} is a dict; give a dict whose keys"),
        ({"recipe_options": "passes=3"}, TypeError, "recipe_options='passes=3' is a str; give"),
        ({"trainer_options": 3}, TypeError, "trainer_options=3 is a int; give a dict"),
        ({"trainer_options": {"max_steps": torch}}, TypeError, "trainer_options max_steps=<module"),
        ({"recipe_options": {"js_weight": math.nan}}, TypeError, "recipe_options js_weight=nan"),
        ({"text_column": 3}, TypeError, "text_column=3 is a int; give columns as a list"),
        ({"text_column": []}, UserError, "name one column, or two"),
        ({"label_column": None}, TypeError, "label_column=None is a NoneType; give a string"),
        ({"pair_separator": 3}, TypeError, "pair_separator=3 is a int; give a string"),
        ({"model": None}, TypeError, "model=None is a NoneType; give a path"),
        ({"test": b"a.csv"}, TypeError, "test=b'a.csv' is a bytes; give a path"),
        ({"test": ""}, UserError, "test='' names no file or folder"),
        ({"overwrite": True, "resume": True}, UserError, "give one of --overwrite, --resume"),
        (
            {"regression": True, "ood": {"o": "none.csv"}},
            UserError,
            "ood o: foreign texts are told",
        ),
        ({"recipe_options": {"speed": 3}}, UserError, "uegr has no option 'speed'; the options"),
        ({"shifted": {"x": "none.csv"}}, UserError, "none.csv cannot be read"),
    ],
)
def test_the_function_names_what_is_wrong(train, tmp_path, wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        finetune(train, tmp_path / "out", **{"model": "textcnn"} | wrong)
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_taken_as_pythons(train, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(task, "_train_all", lambda found, *_, **__: seen.append(found))
    trainer = {"max_steps": 3, "weight_decay": 0.5, "bf16": False}
    numbers = {"limit": 9, "epsilon": 0.5, "epochs": 2.0, "lr": 0.25, "batch": 4, "length": 8}
    for kind in (lambda value: value, lambda value: np.array(value)[()]):
        of_numpy = {name: kind(value) for name, value in trainer.items()}
        finetuning.check_options(of_numpy)
        finetune(
            train,
            tmp_path / "out",
            model="textcnn",
            seed=kind(7),
            recipe_options={"passes": kind(3), "js_weight": kind(0.5)},
            trainer_options=of_numpy,
            **{name: kind(value) for name, value in numbers.items()},
        )
    assert json.dumps(seen[1].settings()) == json.dumps(seen[0].settings())
    assert {type(value) for value in seen[1].trainer_options.values()} == {int, float, bool}
    for name, wrong in (
        ("max_steps", np.float32(3)),
        ("max_steps", np.bool_(True)),
        ("weight_decay", np.bool_(True)),
    ):
        with pytest.raises(TypeError, match=f"trainer_options {name}"):
            finetuning.check_options({name: wrong})


def test_a_small_model_named_by_a_path_is_trained_as_one(train, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(task, "_train_all", lambda found, *_, **__: seen.append(found))
    for model in ("textcnn", pathlib.Path("textcnn")):
        finetune(train, tmp_path / "out", model=model)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["train", "output"])
def test_paths_of_nothing(train, tmp_path, name):
    paths = {"train": train, "output": tmp_path / "out"} | {name: None}
    with pytest.raises(TypeError, match=f"{name}=None is a NoneType; give a path"):
        finetune(**paths, model="textcnn")


def test_a_folder_of_other_things_is_left_alone(train, tmp_path, capsys):
    for more in ([], ["--overwrite"]):
        assert run("--train", train, "--model", "textcnn", "--output", tmp_path, *more) == 2
        assert "holds files that are none of a fine-tuning's" in capsys.readouterr().err
    assert train.exists()


def in_two_processes(arguments, tmp_path, stop_after=None):
    """Runs the command by torchrun; with `stop_after`, as if Ctrl-C came after so many steps."""
    script = tmp_path / "finetune.py"
    script.write_text(f"""
import sys
from uegr_kernels.finetune import command, task

class Pressed:
    steps = 0
    def __enter__(self):
        return self.noticed
    def __exit__(self, *_):
        return None
    def noticed(self):
        self.steps += 1
        return self.steps == {stop_after}

if {stop_after} is not None:
    task.interrupts_noticed = Pressed
sys.exit(command.main(sys.argv[1:]))
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    return subprocess.run(
        [*map(str, [*launch, *arguments, *SMALL])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def whole_batches(train, tmp_path):
    """Arguments of a run whose batches are all whole: the last one's missing texts would be others
    in two processes. Nothing is drawn but the order of the texts.
    """
    arguments = ["--train", tsv(train, texts(64)), "--model", "textcnn", "--recipe", "at"]
    arguments += ["--lr", 1e-2, "--recipe-options", "dropout=0.0"]
    arguments += ["--validation", tsv(tmp_path / "v.tsv", texts(20, 1))]
    return [*arguments, "--test", tsv(tmp_path / "t.tsv", texts(20, 2))]


def assert_alike(one, other):
    found, expected = weights(one), weights(other)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_two_processes_train_as_one(whole_batches, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*whole_batches, "--output", one) == 0
    done = in_two_processes([*whole_batches, "--output", two], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_alike(two, one)
    assert (two / "report.md").exists()


@pytest.mark.long
@pytest.mark.parametrize("stopped", [2, 1], ids=["two then one", "one then two"])
def test_a_run_goes_on_in_another_number_of_processes(
    whole_batches, tmp_path, monkeypatch, stopped
):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(*whole_batches, "--output", whole) == 0
    arguments = [*whole_batches, "--output", parted]
    if stopped == 2:
        done = in_two_processes(arguments, tmp_path, stop_after=11)
        assert "Stopped; what is done is kept" in done.stderr, done.stderr
        assert run(*arguments, "--resume") == 0
    else:
        steps = []
        with monkeypatch.context() as patch:
            noticed = contextlib.nullcontext(lambda: steps.append(1) or len(steps) == 11)
            patch.setattr(task, "interrupts_noticed", lambda: noticed)
            assert run(*arguments) == 130
        done = in_two_processes([*arguments, "--resume"], tmp_path)
        assert done.returncode == 0, done.stderr
    assert_alike(parted, whole)
    assert (parted / "report.md").exists()
