"""Reads labelled texts from files of one's own: .tsv, .csv and .jsonl, each also .gz."""

import gzip
import hashlib
import json
import math
import pathlib
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .data import UserError

FORMATS = (".tsv", ".csv", ".jsonl")
# A longer text is cut: no model here reads so far, and a tokenizer takes seconds for a megabyte.
# characters
LONGEST = 100_000
# names at most in a message
SHOWN = 8
# from here on a number rather measures than counts classes
COUNTED = 1000
# A field of RFC 4180 with what ends it, and a number as people write it; Python reads more, such as
# 1_0 and other scripts' digits.
FIELD = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(,|\r?\n)')
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf(inity)?|nan)", re.ASCII | re.I)
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
# What another format begins with: what it is, and what to do.
BEGINNINGS = {
    b"\x1f\x8b": ("is gzip", "let its name end in .gz, or unpack it"),
    b"PK\x03\x04": ("is a zip archive or a workbook", "unpack it, or save the sheet as .csv"),
    b"\xff\xfe": ("is UTF-16", "iconv -f utf-16 -t utf-8 OLD > NEW"),
    b"\xfe\xff": ("is UTF-16", "iconv -f utf-16 -t utf-8 OLD > NEW"),
}


class Columns(NamedTuple):
    """Names the columns of a file.

    text       one column, or two for pairs of texts
    label      the label's column; None: the file has no labels that matter
    separator  parts the text's one column into a pair; None: it is one text
    regression labels are numbers
    """

    text: tuple[str, ...] = ("text",)
    label: str | None = "label"
    separator: str | None = None
    regression: bool = False


class Example(NamedTuple):
    """Holds one text, or a pair of them, its label as it stands in the file, and the line."""

    texts: tuple[str, ...]
    label: str
    line: int


def read(path: str | pathlib.Path, columns: Columns) -> list[Example]:
    """Reads a file of labelled texts, whose first line (.tsv, .csv) names its columns.

    UTF-8, with or without a byte order mark; lines end in LF or CRLF. In .tsv a quote is a letter
    like any other; in .csv fields are quoted as RFC 4180 has it; in .jsonl each line is an object,
    whose labels may be numbers. Texts of more than 100,000 characters are cut, with one warning.
    Raises UserError, naming file, line and remedy, for everything else.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    kind = kind.lower()
    if kind not in FORMATS:
        raise UserError(
            f"{path}: the name ends in none of {', '.join(FORMATS)} (nor in one of them and .gz); "
            "rename or convert the file"
        )
    content = _decoded(path)
    if kind == ".jsonl":
        rows = _objects(path, content, columns)
    else:
        rows = _fields(path, content, kind, columns)
    return _examples(path, rows, columns)


def digest(path: str | pathlib.Path) -> str:
    """Returns the SHA-256 of a file, by which a resumed run knows that it has not changed."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _decoded(path: pathlib.Path) -> str:
    """Returns a file's text, unzipped; raises UserError for bytes that are no text."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); make it once more") from None
    except (OSError, ValueError) as error:
        # the latter: a name with a NUL
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', error)}; name a file that is there"
        ) from None
    for beginning, (what, remedy) in BEGINNINGS.items():
        if content.startswith(beginning):
            again = " once more inside" * (path.suffix.lower() == ".gz" and what == "is gzip")
            raise UserError(f"{path}, line 1: the file {what}{again}, no UTF-8 text; {remedy}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 ({error.reason}, byte {error.start + 1} of the file); "
            "convert the file to UTF-8"
        ) from None
    if not text.strip():
        raise UserError(
            f"{path}, line 1: the file is empty; it must hold a label and a text a line"
        )
    for pattern, what, remedy in (
        ("\0", "a NUL character", "remove it, or, where the file is UTF-16, convert it to UTF-8"),
        (r"\r(?!\n)", "a carriage return alone", "end lines with LF or CRLF"),
    ):
        found = re.search(pattern, text)
        if found:
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(f"{path}, line {line}: {what}; {remedy}")
    return text


class _Row(NamedTuple):
    """Holds what the named columns have in one row: texts, label, and its first line."""

    texts: tuple[object, ...]
    label: object
    line: int


def _fields(path: pathlib.Path, content: str, kind: str, columns: Columns) -> Iterator[_Row]:
    rows = _separated(path, content) if kind == ".csv" else _tabbed(content)
    header, _ = next(rows)
    names = [name.strip() for name in header]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(
            f"{path}, line 1: two columns are called {doubled!r}; give each a name of its own"
        )
    at = [_place(path, names, name, "--text-column", kind) for name in columns.text]
    of_label = None
    if columns.label is not None:
        of_label = _place(path, names, columns.label, "--label-column", kind)
    for fields, line in rows:
        if len(fields) != len(names):
            what = f"has {len(fields)} column{'s' * (len(fields) != 1)}"
            more = len(fields) > len(names) and kind == ".csv"
            raise UserError(
                f"{path}, line {line}: the line {'is empty' if fields == [''] else what}, and the "
                f"first one names {len(names)} ({listed(names)}); mend or remove the line"
                + ('; a text with a comma in it stands in quotes, "so, then"' if more else "")
            )
        label = "" if of_label is None else fields[of_label]
        yield _Row(tuple(fields[i] for i in at), label, line)


def listed(names: Iterable[str]) -> str:
    """Returns names for a message: the first few of many, each cut where it is long."""
    every = [*names]
    more = f", ... ({len(every)} in all)" if len(every) > SHOWN else ""
    return ", ".join(map(shown, every[:SHOWN])) + more


def shown(value: str) -> str:
    """Returns a string in quotes for a message, cut where it is long."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _near(name: str, names: Iterable[str]) -> str:
    """Returns the name that differs by case or space alone, as a hint, or nothing."""
    for other in names:
        if other.strip().casefold() == name.strip().casefold():
            return f" ({shown(other)} is another: case counts)"
    return ""


def _place(path: pathlib.Path, names: list[str], name: str, option: str, kind: str) -> int:
    if name in names:
        return names.index(name)
    own = "\t" if kind == ".tsv" else ","
    for separator, word in SEPARATORS.items():
        parts = [part.strip().strip('"') for each in names for part in each.split(separator)]
        if separator != own and name in parts:
            raise UserError(
                f"{path}, line 1: the columns are parted by {word}, and those of {kind} by "
                f"{SEPARATORS[own]}; save the file so"
                + (", or let its name end in .tsv" if separator == "\t" else "")
                + (", or let its name end in .csv" if separator == "," else "")
            )
    raise UserError(
        f"{path}, line 1: no column is called {name!r}{_near(name, names)}; the first line names "
        f"{listed(names)}. Name the right one with {option}, or add a first line of column names"
    )


def _tabbed(content: str) -> Iterator[tuple[list[str], int]]:
    lines = content.split("\n")
    # a line of tabs is a row of empty fields
    while lines[-1] in ("", "\r"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield line.removesuffix("\r").split("\t"), number


def _separated(path: pathlib.Path, content: str) -> Iterator[tuple[list[str], int]]:
    """Yields the rows of RFC 4180 with their first lines; Python's csv takes quotes anywhere."""
    content = content.rstrip("\r\n") + "\n"
    place, line, lines = 0, 1, 1
    fields: list[str] = []
    while place < len(content):
        found = FIELD.match(content, place)
        if found is None:
            what = "a quote inside a field without quotes"
            if re.compile(' +"').match(content, place):
                what = "a space before a quote"
            if content[place] == '"':
                whole = re.compile(r'"[^"]*(?:""[^"]*)*"').match(content, place)
                what = "text after a closing quote" if whole else "a quote that is never closed"
            raise UserError(
                f"{path}, line {lines}: {what}; quote a field whole, and write a quote in it twice "
                '("")'
            )
        quoted, plain, end = found.groups()
        fields.append(plain if quoted is None else quoted.replace('""', '"'))
        lines += found[0].count("\n")
        place = found.end()
        if end != ",":
            yield fields, line
            fields, line = [], lines


def _objects(path: pathlib.Path, content: str, columns: Columns) -> Iterator[_Row]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"{doubled!r} stands twice in the object")
        return dict(pairs)

    for number, line in enumerate(content.rstrip().split("\n"), 1):
        where = f"{path}, line {number}"
        try:
            found = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            why = "the line is empty" if not line.strip() else f"not JSON ({error})"
            raise UserError(f"{where}: {why}; write one object a line") from None
        if not isinstance(found, dict):
            array = ": jq -c '.[]' OLD > NEW" if isinstance(found, list) else ""
            raise UserError(f"{where}: {_kind(found)}, no object; write one object a line{array}")
        names = [*columns.text, *([] if columns.label is None else [columns.label])]
        for name in names:
            if name not in found:
                option = "--label-column" if name == columns.label else "--text-column"
                raise UserError(
                    f"{where}: no {name!r}{_near(name, found)}; the object has "
                    f"{listed(found) or 'none'}. Name the right one with {option}"
                )
        texts = tuple(found[name] for name in columns.text)
        yield _Row(texts, "" if columns.label is None else found[columns.label], number)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return {"dict": "an object", "list": "a list", "str": "a string"}.get(
        type(value).__name__, "a number"
    )


def _examples(path: pathlib.Path, rows: Iterable[_Row], columns: Columns) -> list[Example]:
    found, cut = [], []
    for row in rows:
        where = f"{path}, line {row.line}"
        texts = tuple(_text(where, value) for value in row.texts)
        if columns.separator is not None:
            texts = tuple(part.strip() for part in texts[0].split(columns.separator))
            if len(texts) != 2:
                raise UserError(
                    f"{where}: {columns.separator!r} stands {len(texts) - 1} times in the text; "
                    "a pair has it once (--pair-separator)"
                )
        if not all(map(_visible, texts)):
            raise UserError(f"{where}: the text is empty; write one, or remove the line")
        if any(len(text) > LONGEST for text in texts):
            cut.append(row.line)
            texts = tuple(text[:LONGEST] for text in texts)
        found.append(Example(texts, _label(where, row.label, columns), row.line))
    if not found:
        raise UserError(f"{path}, line 2: the file ends without an example; add some")
    if cut:
        warnings.warn(
            f"{path}, line {cut[0]}: a text of more than {LONGEST:,} characters is cut there"
            + (f", and {len(cut) - 1} more in other lines" if len(cut) > 1 else ""),
            stacklevel=3,
        )
    return found


def _visible(text: str) -> bool:
    """Returns whether a text has a character that is neither space nor without width."""
    return any(unicodedata.category(c) not in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: the text is {_kind(value)}; it must be a string")
    return _written(where, value)


def _written(where: str, text: str) -> str:
    """Returns a text without the space around it; raises for what JSON can escape into one."""
    if "\0" in text:
        raise UserError(f"{where}: a NUL character; is the file text? remove it")
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: half a character (a lone surrogate); write the whole one")
    return text.strip()


def _label(where: str, value: object, columns: Columns) -> str:
    if columns.label is None:
        return ""
    if value is None or isinstance(value, dict | list):
        raise UserError(f"{where}: the label is {_kind(value)}; it must be a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: the label '{value}' is not finite; mend or remove the line")
    label = _written(where, str(value).lower() if isinstance(value, bool) else str(value))
    if not _visible(label):
        raise UserError(f"{where}: the label is empty; write one, or remove the line")
    if columns.regression:
        if not NUMBER.fullmatch(label):
            raise UserError(
                f"{where}: the label {shown(label)} is no number, and --regression needs one, in "
                "digits with a point"
            )
        if _finite(label) is None:
            raise UserError(f"{where}: the label {label!r} is not finite; mend or remove the line")
    return label


def part(
    examples: Sequence[Example], share: float, *, regression: bool, salt: str = ""
) -> tuple[list[Example], list[Example]]:
    """Returns the examples kept and a share of them held out, of every label alike.

    Who is held out is a matter of the texts' SHA-256 alone; equal texts stay on one side, and a
    label of one text keeps it.
    """
    by_label: dict[str, dict[tuple[str, ...], None]] = {}
    seen: set[tuple[str, ...]] = set()
    # whatever their order in the file
    for example in sorted(examples):
        if example.texts not in seen:
            seen.add(example.texts)
            label = "" if regression else example.label
            by_label.setdefault(label, {})[example.texts] = None
    held: set[tuple[str, ...]] = set()
    for texts in by_label.values():
        order = sorted(texts, key=lambda each: _hash(each, salt))
        held.update(order[: round(share * len(order))])
    return (
        [example for example in examples if example.texts not in held],
        [example for example in examples if example.texts in held],
    )


class Files(NamedTuple):
    """Names the files of a task; None and empty where there is none of that kind.

    shifted  labelled texts of other origins, by a name for the report
    ood      texts that are none of the task's, whose labels do not matter
    """

    train: str
    validation: str | None = None
    test: str | None = None
    shifted: dict[str, str] = {}  # noqa: RUF012
    ood: dict[str, str] = {}  # noqa: RUF012

    def named(self) -> dict[str, str]:
        """Returns every file by the option that named it."""
        found = {"--train": self.train, "--validation": self.validation, "--test": self.test}
        found |= {f"--shifted {name}": path for name, path in self.shifted.items()}
        found |= {f"--ood {name}": path for name, path in self.ood.items()}
        return {option: path for option, path in found.items() if path is not None}


class Data(NamedTuple):
    """Holds the examples of a task, and its labels in order, none for regression."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    shifted: dict[str, list[Example]]
    ood: dict[str, list[Example]]
    labels: list[str]


def load(files: Files, columns: Columns, limit: int | None = None) -> Data:
    """Reads all files of a task and holds out what has none of its own.

    Without a test file a fifth of the training texts is held out for it, without a validation file
    a tenth of the rest; which ones is a matter of the texts alone. `limit`: at most so many of
    each file's examples, in the order of their hashes. Raises UserError for what `read` refuses,
    for labels that do not occur in training, and where too little is left.
    """
    train = limited(read(files.train, columns), limit)
    labels = [] if columns.regression else _in_order({example.label for example in train})
    if not columns.regression and len(labels) < 2:
        raise UserError(
            f"{files.train}, line {train[-1].line}: every label up to this last line is "
            f"{shown(train[0].label)}; two are needed"
            + ("" if limit is None else ", or a larger --limit")
        )
    _check_values(files.train, labels)
    _check_spread(files.train, train, columns)
    rest = {}
    for option, path in files.named().items():
        if option == "--train":
            continue
        ood = option.startswith("--ood")
        found = limited(read(path, columns._replace(label=None) if ood else columns), limit)
        strange = next((one for one in found if labels and one.label not in labels), None)
        if strange is not None and not ood:
            raise UserError(
                f"{path}, line {strange.line}: the label {shown(strange.label)} does not occur in "
                f"{files.train}, whose labels are {listed(labels)}; mend it or remove the line"
            )
        if not ood:
            _check_spread(path, found, columns)
        rest[option] = found
    _check_apart(files)
    parts = {}
    for option, share in (("--test", 0.2), ("--validation", 0.1)):
        if option in rest:
            parts[option] = rest[option]
            continue
        before = train
        train, parts[option] = part(before, share, regression=columns.regression, salt=option)
        if not parts[option] or not train:
            raise UserError(
                f"{files.train}: {_counted(before, columns)} are too few to hold out some for "
                f"{option}; give more, or a file of your own with {option}"
                + _mistaken(before, labels)
            )
        for what, some in ((f"held out for {option}", parts[option]), ("left to train on", train)):
            _check_spread(f"{files.train}, the examples {what}", some, columns)
    _check_classes(files.train, labels)
    return Data(
        train,
        parts["--validation"],
        parts["--test"],
        {name: rest[f"--shifted {name}"] for name in files.shifted},
        {name: rest[f"--ood {name}"] for name in files.ood},
        labels,
    )


def _counted(examples: Sequence[Example], columns: Columns) -> str:
    """Returns how many examples, texts and labels there are, for a message."""
    texts, labels = ({each[i] for each in examples} for i in (0, 1))
    classes = "" if columns.regression else f", labels: {len(labels)}"
    return f"{len(examples)} examples (different texts: {len(texts)}{classes})"


def _mistaken(examples: Sequence[Example], labels: Sequence[str]) -> str:
    """Returns what else may be wrong where examples are too few for their classes, or nothing."""
    if len(labels) > 2 and all(_finite(label) is not None for label in labels):
        return "; or, where labels are numbers, add --regression"
    if len(labels) == len(examples) > 2:
        return "; no label occurs twice: is --label-column the right one?"
    return ""


def _check_values(path: str, labels: Sequence[str]) -> None:
    """Raises where two labels are one number, as 1 and 1.0 are; warns where two are one word."""
    seen: dict[float, str] = {}
    for label in labels:
        number = _finite(label)
        if number is not None and seen.setdefault(number, label) != label:
            raise UserError(
                f"{path}: the labels {seen[number]!r} and {label!r} are one number; write it in "
                "one way"
            )
    spelt: dict[str, str] = {}
    for label in labels:
        if spelt.setdefault(label.casefold(), label) != label:
            warnings.warn(
                f"{path}: the labels {shown(spelt[label.casefold()])} and {shown(label)} differ by "
                "case alone, and are learned as two; where they are one, write it in one way",
                stacklevel=4,
            )


def _check_classes(path: str, labels: Sequence[str]) -> None:
    """Warns where all labels are numbers, and not those that classes are counted or named by."""
    numbers = [number for label in labels if (number := _finite(label)) is not None]
    if len(numbers) == len(labels) and any(n % 1 or abs(n) >= COUNTED for n in numbers):
        warnings.warn(
            f"{path}: the labels are numbers ({listed(labels)}), and each is learned as a class; "
            "where they measure something, add --regression",
            stacklevel=4,
        )


def _check_spread(where: str, examples: Sequence[Example], columns: Columns) -> None:
    """Raises where all labels of a regression are one number: nothing correlates with it."""
    if columns.regression and len({_finite(example.label) for example in examples}) < 2:
        raise UserError(
            f"{where}, line {examples[-1].line}: every label up to this last line is "
            f"{examples[0].label}; a regression needs two different ones"
        )


def _check_apart(files: Files) -> None:
    """Warns where two of the three parts are one file."""
    named = [("--train", files.train), ("--validation", files.validation), ("--test", files.test)]
    seen: dict[pathlib.Path, str] = {}
    for option, path in named:
        if path is not None:
            other = seen.setdefault(pathlib.Path(path).resolve(), option)
            if other != option:
                warnings.warn(
                    f"{option} {path} is the file of {other} too: what is reported should not have "
                    "been trained on, nor chosen by; name another, or leave it out",
                    stacklevel=4,
                )


def limited(examples: list[Example], limit: int | None) -> list[Example]:
    """Returns at most so many examples, those whose texts' hashes come first, in their order."""
    if limit is None or len(examples) <= limit:
        return examples
    kept = sorted(range(len(examples)), key=lambda i: _hash(examples[i].texts))[:limit]
    return [examples[i] for i in sorted(kept)]


def _in_order(labels: set[str]) -> list[str]:
    """Sorts labels, by their value where all are numbers."""
    numbers = {label: _finite(label) for label in labels}
    if None in numbers.values():
        return sorted(labels)
    return sorted(labels, key=lambda label: (numbers[label], label))


def _finite(text: str) -> float | None:
    """Returns the number that a text is, or None."""
    number = float(text) if NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def _hash(texts: tuple[str, ...], salt: str = "") -> bytes:
    return hashlib.sha256("\0".join((salt, *texts)).encode()).digest()
