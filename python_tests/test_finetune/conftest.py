"""A set of texts whose words tell the label, and a random BERT of two layers that reads them."""

import json
import pathlib
import random

import pytest
import torch

from uegr_kernels.finetune import command

SMALL = ["--length", "16", "--batch", "8", "--epochs", "2", "--device", "cpu"]
WORDS = {"neg": "bad dull slow weak", "pos": "good fine fast strong"}
OTHERS = "film number a the is so very".split()


def texts(count, seed=0):
    draw = random.Random(seed)
    return [
        (label, " ".join(draw.choices(WORDS[label].split() + OTHERS, k=7)) + f" {label[0]}")
        for label in list(WORDS) * (count // 2)
    ]


def tsv(path: pathlib.Path, rows):
    path.write_text("".join(f"{label}\t{text}\n" for label, text in [("label", "text"), *rows]))
    return path


def run(*arguments):
    """Runs the command on small batches of short texts."""
    return command.main([*map(str, arguments), *SMALL])


def strict(folder):
    """Reads a report as a reader does who takes no NaN and no Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


@pytest.fixture
def train(tmp_path):
    return tsv(tmp_path / "train.tsv", texts(60))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *OTHERS,
        *" ".join(WORDS.values()).split(),
    ]
    letters = [f"{mark}{c}" for c in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*words, *letters])))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=80,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder
