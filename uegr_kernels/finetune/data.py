"""Makes words of texts, and reads this machine's docstrings as texts to try."""

import ast
import contextlib
import hashlib
import os
import pathlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

UNKNOWN, VOCABULARY = 1, 8000
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


class UserTypeError(UserError, TypeError):
    """Signals an argument of a type that it cannot have, as UserError does."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns the ValueError and TypeError of a check of arguments into UserError, which a command
    shows without a traceback.
    """
    try:
        yield
    except UserError:
        raise
    except TypeError as error:
        raise UserTypeError(str(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


class Progress(Protocol):
    """Passes on what it is given, and shows how far it is, as tqdm.tqdm does."""

    def __call__(self, items: Iterable[T], /, *, desc: str, unit: str) -> Iterable[T]: ...


def words_of(text: str) -> tuple[str, ...]:
    """Returns the words of a text in lower case."""
    return tuple(WORD.findall(text.lower()))


def read_docstrings(packages: int, each: int, progress: Progress) -> list[tuple[str, str]]:
    """Reads docstrings of the standard library and of the installed packages; returns (package,
    text), `each` texts of so many packages, those that have them first by name.

    Files are parsed, not imported, in the order of a hash of their path, until a package has given
    enough, and twice as many packages as are wanted have. What would give the answer away is taken
    out: every package's name wherever it occurs, and texts that two of the packages share.
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
    # some will turn out to be another package's too
    enough = 1.2 * each
    for name in progress(sorted(sources), desc="reading docstrings", unit="package"):
        texts = heads[name] = set()
        for file in _python_files(sources[name]):
            for text in _docstrings_in(file):
                words = tuple(
                    word for word in words_of(text) if word not in names and not long.search(word)
                )
                if len(words) >= 8:
                    texts.add(words[:64])
            if len(texts) > enough:
                break
        if sum(len(texts) > enough for texts in heads.values()) == 2 * packages:
            break
    holders = Counter(words for texts in heads.values() for words in texts)
    own = {
        name: sorted((words for words in texts if holders[words] == 1), key=_hash)
        for name, texts in heads.items()
    }
    chosen = [name for name in own if len(own[name]) >= each][:packages]
    if len(chosen) < 2:
        raise UserError(
            f"fewer than two packages here have {each} docstrings; name a file of your own with "
            "--train FILE"
        )
    return [(name, " ".join(words)) for name in chosen for words in own[name][:each]]


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
    # seconds to parse
    if os.path.getsize(file) > 200_000:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(pathlib.Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found: list[str | None] = []
    scopes: list[Scope] = [tree]
    # ast.walk would visit every expression
    for scope in scopes:
        found.append(ast.get_docstring(scope))
        scopes += [
            node
            for node in scope.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
    return [text for text in found if text]


def _hash(words: Iterable[str]) -> bytes:
    return hashlib.sha256(" ".join(words).encode()).digest()


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
