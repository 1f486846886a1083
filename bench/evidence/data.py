"""Reads sets of labelled texts from a folder, in our own format or in GLUE's."""

import contextlib
import functools
import gzip
import math
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from uegr_kernels.finetune.data import UserError

# between the two texts of a pair
PAIR = " ||| "
# File stem of the test, columns of the text or texts, column of the label, metric (GLUE's; names,
# or numbers where there is no header).
GLUE: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "cola": ("dev", (3,), 1, "matthews"),
    "sst-2": ("dev", ("sentence",), "label", "accuracy"),
    "mrpc": ("dev", ("#1 String", "#2 String"), "Quality", "accuracy"),
    "sts-b": ("dev", ("sentence1", "sentence2"), "score", "correlation"),
    "mnli": ("dev_matched", ("sentence1", "sentence2"), "gold_label", "accuracy"),
    "qqp": ("dev", ("question1", "question2"), "is_duplicate", "accuracy"),
    "qnli": ("dev", ("question", "sentence"), "label", "accuracy"),
    "rte": ("dev", ("sentence1", "sentence2"), "label", "accuracy"),
    "wnli": ("dev", ("sentence1", "sentence2"), "label", "accuracy"),
}


class Row(NamedTuple):
    """Holds an example as it is on disk."""

    label: str
    # one, or a pair
    texts: tuple[str, ...]


class TextSet(NamedTuple):
    """Holds a set as it is on disk; `metric` is accuracy, matthews or correlation (the mean of
    Pearson's and Spearman's: a regression).
    """

    train: list[Row]
    test: list[Row]
    metric: str

    @property
    def labels(self) -> list[str]:
        return sorted({row.label for row in self.train})


def sets_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of the sets: folders with train.tsv.gz and test.tsv.gz, or GLUE's."""
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: no such folder; name one that holds folders "
            "NAME/train.tsv.gz, NAME/test.tsv.gz"
        )
    found = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_dir() and (_own(path) or _glue(path))
    ]
    if not found:
        raise UserError(
            f"--data {folder}: no set; it must hold folders NAME/train.tsv.gz, NAME/test.tsv.gz, "
            "or GLUE's, NAME/train.tsv, dev.tsv"
        )
    return found


def _own(path: pathlib.Path) -> bool:
    return (path / "train.tsv.gz").exists() and (path / "test.tsv.gz").exists()


def _glue(path: pathlib.Path) -> bool:
    known = GLUE.get(path.name.lower())
    return (
        known is not None and (path / "train.tsv").exists() and (path / f"{known[0]}.tsv").exists()
    )


@functools.lru_cache
def read(folder: pathlib.Path, name: str) -> TextSet:
    """Reads the set of this name."""
    path = folder / name
    if _own(path):
        train, test = (_rows(path / f"{part}.tsv.gz") for part in ("train", "test"))
        labels = {row.label for row in train}
        real = (
            len(labels) > 20
            and all(map(_number, train))
            and not all(label.lstrip("-").isdecimal() for label in labels)
        )
        metric = "correlation" if real else "accuracy"
        return TextSet(train, test, metric)
    if not _glue(path):
        raise UserError(f"{path}: no such set; there are {', '.join(sets_in(folder))}")
    stem, texts, label, metric = GLUE[name.lower()]
    return TextSet(
        *(_columns(path / f"{part}.tsv", texts, label) for part in ("train", stem)), metric
    )


@functools.lru_cache
def read_test(folder: pathlib.Path, name: str) -> list[Row]:
    """Reads the test alone, of a set that may have no training part."""
    path = folder / name
    if (path / "test.tsv.gz").exists():
        return _rows(path / "test.tsv.gz")
    stem, texts, label, _ = GLUE.get(name.lower(), ("test", (), "", ""))
    if not texts or not (path / f"{stem}.tsv").exists():
        raise UserError(f"{path}: no test.tsv.gz there, and no test of GLUE's")
    return _columns(path / f"{stem}.tsv", texts, label)


def digest(folder: pathlib.Path, name: str) -> str:
    """Returns eight digits that change with the set's files."""
    content = b"".join(path.read_bytes() for path in sorted((folder / name).glob("*.tsv*")))
    return f"{zlib.crc32(content):08x}"


def check(folder: pathlib.Path, name: str, others: Iterable[str] = ()) -> None:
    """Raises UserError where a model of this set cannot be trained, or its test, or that of
    `others`, has labels that it does not know.
    """
    data = read(folder, name)
    if len(data.train) < 2:
        raise UserError(
            f"{folder / name}: {len(data.train)} text to train on; two are needed at least"
        )
    if data.metric == "correlation":
        return
    if len(data.labels) < 2:
        raise UserError(f"{folder / name}: every label is {data.labels[0]!r}; two are needed")
    for whose, rows in [
        (name, data.test),
        *((other, read_test(folder, other)) for other in others),
    ]:
        if unknown := {row.label for row in rows} - set(data.labels):
            known = ", ".join(data.labels[:10])
            raise UserError(
                f"{folder / whose}: the test has the label {min(unknown)!r}, which {name}'s "
                f"training set has not; it has {known}"
            )


def _lines(path: pathlib.Path) -> list[str]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    # splitlines() knows other ends, which texts may hold
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _rows(path: pathlib.Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path)[1:], 2):
        label, tab, text = line.partition("\t")
        if not (tab and label and text):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not label<TAB>text")
        rows.append(Row(label, tuple(text.split(PAIR, 1))))
    if not rows:
        raise UserError(f"{path} holds no example after its header")
    return rows


def _columns(path: pathlib.Path, texts: Sequence[Any], label: Any) -> list[Row]:
    """Reads GLUE's columns; a line that is too short is left out, as GLUE's own readers do (QQP has
    some).
    """
    lines = [line.split("\t") for line in _lines(path)]
    if isinstance(label, str):
        head = lines.pop(0)
        missing = [name for name in (*texts, label) if name not in head]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(head)}")
        texts, label = [head.index(name) for name in texts], head.index(label)
    return [
        Row(line[label], tuple(line[i] for i in texts))
        for line in lines
        if len(line) > max(*texts, label)
    ]


def _number(row: Row) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(row.label))
    return False
