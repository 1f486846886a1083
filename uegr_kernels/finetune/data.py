"""Reads labelled texts, from files or from this machine's docstrings, and makes them tensors."""

import ast
import gzip
import hashlib
import os
import pathlib
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..models import PADDING

UNKNOWN, VOCABULARY = 1, 8000
# classes at most, docstrings of each at most and at least
PACKAGES, PER_PACKAGE, FEWEST = 20, 300, 150
T = TypeVar("T")

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# A word is a run of letters or of digits, or one Chinese, Japanese or Korean character; the
# underscore separates.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\d+"
)
# What names a package beside its own name.
ALIASES = {"np", "plt", "mpl", "nx", "pd", "tl", "pillow", "cpython", "pypi"}
# Tests, and copies of other packages.
SKIPPED = set(
    "test tests testing _vendor vendor _vendored third_party _distutils lib2to3 "
    "site-packages dist-packages".split()
)


class UserError(ValueError):
    """Signals what the user can mend; a command shows it without a traceback."""


class Progress(Protocol):
    """Passes on what it is given, and shows how far it is, as tqdm.tqdm does."""

    def __call__(self, items: Iterable[T], /, *, desc: str, unit: str) -> Iterable[T]: ...


class Example(NamedTuple):
    """Holds a labelled text, in words, and the line of the file that it is from."""

    label: str
    words: tuple[str, ...]
    line: int = 0


class Texts(NamedTuple):
    """Holds examples as tensors: ids [n, T], padded with 0, and labels [n]."""

    ids: Tensor
    labels: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the inputs and labels of some rows, cut to the longest of their texts."""
        ids = self.ids[rows]
        ids = ids[:, : int((ids != PADDING).sum(1).max())]
        return {"ids": ids, "attention_mask": ids != PADDING}, self.labels[rows]


class Data(NamedTuple):
    """Holds the two parts of a set, its classes, and how many word numbers there are."""

    train: Texts
    test: Texts
    classes: list[str]
    words: int


def words_of(text: str) -> tuple[str, ...]:
    """Returns the words of a text in lower case."""
    return tuple(WORD.findall(text.lower()))


def read_tsv(path: str) -> list[Example]:
    """Reads lines of label<TAB>text, gzip where the name ends in .gz; a first line "label<TAB>text"
    is a header.
    """
    try:
        content = pathlib.Path(path).read_bytes()
        if path.endswith(".gz"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    examples = []
    for number, raw in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); "
                "convert the file to UTF-8"
            ) from None
        label, tab, text = line.partition("\t")
        if number == 1 and (label, text) == ("label", "text"):
            continue
        if not tab:
            raise UserError(f"{where}: no tab; every line must be label<TAB>text")
        if not label.strip():
            raise UserError(f"{where}: the label is empty; every line must be label<TAB>text")
        if not text.strip():
            raise UserError(f"{where}: the text is empty; every line must be label<TAB>text")
        examples.append(Example(label.strip(), words_of(text), number))
    if not examples:
        raise UserError(
            f"{path}, line {len(lines) + 1}: the file ends without an example; write "
            "lines of label<TAB>text"
        )
    return examples


def read_docstrings(progress: Progress) -> list[Example]:
    """Reads docstrings of the standard library and of the installed packages, labelled with
    their package.

    Files are parsed, not imported, in the order of a hash of their path, until a package has given
    enough. What would give the answer away is taken out: every package's name wherever it occurs,
    and texts that two packages share.
    """
    sources = {"python": pathlib.Path(sysconfig.get_path("stdlib"))}
    for folder in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for path in pathlib.Path(folder).iterdir():
            if (
                path.is_dir()
                and path.name.isidentifier()
                and path.name not in SKIPPED | {"uegr_kernels"}
            ):
                sources[path.name] = path
    names = {name.strip("_").lower() for name in sources} | ALIASES
    long = re.compile("|".join(sorted(name for name in names if len(name) > 4)))

    heads: dict[str, set[tuple[str, ...]]] = {}
    for name in progress(sorted(sources), desc="reading docstrings", unit="package"):
        texts = heads[name] = set()
        for file in _python_files(sources[name]):
            for text in _docstrings_in(file):
                words = tuple(
                    word for word in words_of(text) if word not in names and not long.search(word)
                )
                if len(words) >= 8:
                    texts.add(words[:64])
            if len(texts) > 1.2 * PER_PACKAGE:  # some will turn out to be another package's too
                break
    holders = Counter(words for texts in heads.values() for words in texts)
    own = {
        name: sorted((words for words in texts if holders[words] == 1), key=_hash)
        for name, texts in heads.items()
    }
    chosen = sorted(
        (name for name in own if len(own[name]) >= FEWEST),
        key=lambda name: (-min(len(own[name]), PER_PACKAGE), name),
    )[:PACKAGES]
    if len(chosen) < 2:
        raise UserError(
            f"fewer than two packages here have {FEWEST} docstrings; name a file of "
            "your own with --data FILE.tsv"
        )
    return [Example(name, words) for name in chosen for words in own[name][:PER_PACKAGE]]


def _python_files(root: pathlib.Path) -> list[str]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        files += [
            os.path.join(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith("test_")
        ]
    return sorted(files, key=lambda file: _hash((os.path.relpath(file, root),)))


def _docstrings_in(file: str) -> list[str]:
    if os.path.getsize(file) > 200_000:  # seconds to parse
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(pathlib.Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found: list[str | None] = []
    scopes: list[Scope] = [tree]
    for scope in scopes:  # ast.walk would visit every expression
        found.append(ast.get_docstring(scope))
        scopes += [
            node
            for node in scope.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
    return [text for text in found if text]


def _hash(words: Iterable[str]) -> bytes:
    return hashlib.sha256(" ".join(words).encode()).digest()


def prepare(
    examples: list[Example], test: list[Example] | None, limit: int | None, length: int
) -> Data:
    """Cuts texts to `length` words and parts them; equal texts stay on one side, and the order
    is that of their hashes.
    """
    examples = _cut(examples, limit, length)
    if test is None:
        texts = list(dict.fromkeys(example.words for example in examples))
        held = set(texts[: max(1, len(texts) // 5)])
        test = [example for example in examples if example.words in held]
    else:
        test = _cut(test, limit, length)
        held = {example.words for example in test}
    train = [example for example in examples if example.words not in held]
    classes = sorted({example.label for example in examples})
    if len({example.label for example in train}) < 2:
        raise UserError(
            f"{len(train)} texts are left to train on and they have not two labels; "
            "use more lines, or a larger --limit"
        )
    index = vocabulary(example.words for example in train)
    number = {label: i for i, label in enumerate(classes)}

    def encoded(examples: list[Example]) -> Texts:
        return Texts(
            encode((example.words for example in examples), index),
            torch.tensor([number[example.label] for example in examples]),
        )

    return Data(encoded(train), encoded(test), classes, len(index) + UNKNOWN + 1)


def vocabulary(texts: Iterable[Sequence[str]]) -> dict[str, int]:
    """Numbers the words that occur twice or more from UNKNOWN + 1 on, the commonest first,
    VOCABULARY at most.
    """
    counts = Counter(word for words in texts for word in words)
    kept = sorted(
        (word for word, count in counts.items() if count > 1),
        key=lambda word: (-counts[word], word),
    )[:VOCABULARY]
    return {word: i for i, word in enumerate(kept, UNKNOWN + 1)}


def encode(texts: Iterable[Sequence[str]], index: dict[str, int]) -> Tensor:
    """Returns word numbers [n, T], padded; a text without a word is one unknown word."""
    rows = [[index.get(word, UNKNOWN) for word in words] or [UNKNOWN] for words in texts]
    ids = torch.full((len(rows), max(map(len, rows))), PADDING)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return ids


def _cut(examples: list[Example], limit: int | None, length: int) -> list[Example]:
    cut = [example._replace(words=example.words[:length]) for example in examples]
    return sorted(cut, key=lambda example: (_hash(example.words), example.line))[:limit]


class Source(NamedTuple):
    """Names where the texts come from, and how much of them is read.

    path    a file of label<TAB>text; None: this machine's docstrings
    test    the same, to test on; None: a fifth of the texts
    limit   texts of each file at most; None: all;  length  words of a text that are read
    """

    path: str | None
    test: str | None
    limit: int | None
    length: int


def load(source: Source, progress: Progress) -> tuple[Data, str]:
    """Returns the data of a source, and a sentence about it."""
    test = None
    if source.path is None:
        examples = read_docstrings(progress)
        kind = "docstrings; the class is the package they come from"
    else:
        examples = read_tsv(source.path)
        kind = f"texts of {source.path}"
        labels = {example.label for example in examples}
        if len(labels) < 2:
            raise UserError(
                f"{source.path}, line {examples[-1].line}: every label up to this last line is "
                f"{examples[0].label!r}; two are needed"
            )
        if source.test is not None:
            test = read_tsv(source.test)
            for example in test:
                if example.label not in labels:
                    raise UserError(
                        f"{source.test}, line {example.line}: the label "
                        f"{example.label!r} does not occur in {source.path}"
                    )
    data = prepare(examples, test, source.limit, source.length)
    trained, tested = len(data.train.labels), len(data.test.labels)
    names = ", ".join(data.classes[:20]) + (", ..." if len(data.classes) > 20 else "")
    return data, (
        f"{trained + tested:,} {kind}.\n{len(data.classes)} classes: "
        f"{names}.\n{trained:,} to train on, {tested:,} to test."
    )
