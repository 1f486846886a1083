"""The main job on real text: fine-tunes one classifier with AdamW and with UEGR, then compares
accuracy, robustness and cost.
"""

import argparse
import ast
import contextlib
import gzip
import hashlib
import importlib.util
import inspect
import math
import os
import pathlib
import re
import shlex
import signal
import statistics
import sys
import sysconfig
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import recipes
from .bistage import BiStage
from .core import native
from .models import MODELS, PADDING, TextClassifier
from .perturbation import fgm_perturbation
from .selective import SelectiveAdamW, selection_mask

ARMS = ("AdamW", "UEGR")
ATTACKS = (0.25, 0.5, 1.0)  # L2 per text; a word vector has length 1 at the start
LEARNING_RATE, BATCH = 1e-3, 32
SAVE_EVERY, SHARE_EVERY = 50, 25  # steps
UNKNOWN, VOCABULARY = 1, 8000
# classes at most, docstrings of each at most and at least
PACKAGES, PER_PACKAGE, FEWEST = 20, 300, 150
CHECKPOINT, PICTURE = "checkpoint.pt", "demo.png"

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


class DemoError(Exception):
    """Something the reader can mend; shown without a traceback."""


class Stopped(Exception):
    """Ctrl-C, noticed between two steps."""


class Example(NamedTuple):
    label: str
    words: tuple[str, ...]
    line: int = 0


class Texts(NamedTuple):
    """Examples as tensors: ids [n, T], padded with 0, and labels [n]."""

    ids: Tensor
    labels: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        ids = self.ids[rows]
        ids = ids[:, : int((ids != PADDING).sum(1).max())]
        return {"ids": ids, "attention_mask": ids != PADDING}, self.labels[rows]


class Data(NamedTuple):
    train: Texts
    test: Texts
    classes: list[str]
    words: int


# Reading


def words_of(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def read_tsv(path: str) -> list[Example]:
    """Lines of label<TAB>text, gzip where the name ends in .gz; a first line "label<TAB>text"
    is a header.
    """
    try:
        content = pathlib.Path(path).read_bytes()
        if path.endswith(".gz"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DemoError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}") from None
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    examples = []
    for number, raw in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DemoError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); "
                "convert the file to UTF-8"
            ) from None
        label, tab, text = line.partition("\t")
        if number == 1 and (label, text) == ("label", "text"):
            continue
        if not tab:
            raise DemoError(f"{where}: no tab; every line must be label<TAB>text")
        if not label.strip():
            raise DemoError(f"{where}: the label is empty; every line must be label<TAB>text")
        if not text.strip():
            raise DemoError(f"{where}: the text is empty; every line must be label<TAB>text")
        examples.append(Example(label.strip(), words_of(text), number))
    if not examples:
        raise DemoError(
            f"{path}, line {len(lines) + 1}: the file ends without an example; write "
            "lines of label<TAB>text"
        )
    return examples


def read_docstrings(progress: Callable[..., Iterable[Any]]) -> list[Example]:
    """Docstrings of the standard library and of the installed packages, labelled with their
    package.

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
        raise DemoError(
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
    scopes: list[Any] = [tree]
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
        raise DemoError(
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
    """Numbers from UNKNOWN + 1 on for the words that occur twice or more, the commonest first,
    VOCABULARY at most.
    """
    counts = Counter(word for words in texts for word in words)
    kept = sorted(
        (word for word, count in counts.items() if count > 1),
        key=lambda word: (-counts[word], word),
    )[:VOCABULARY]
    return {word: i for i, word in enumerate(kept, UNKNOWN + 1)}


def encode(texts: Iterable[Sequence[str]], index: dict[str, int]) -> Tensor:
    """Word numbers [n, T], padded; a text without a word is one unknown word."""
    rows = [[index.get(word, UNKNOWN) for word in words] or [UNKNOWN] for words in texts]
    ids = torch.full((len(rows), max(map(len, rows))), PADDING)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return ids


def _cut(examples: list[Example], limit: int | None, length: int) -> list[Example]:
    cut = [example._replace(words=example.words[:length]) for example in examples]
    return sorted(cut, key=lambda example: (_hash(example.words), example.line))[:limit]


def load(options: argparse.Namespace, progress: Callable[..., Iterable[Any]]) -> tuple[Data, str]:
    """The data that the options name, and a sentence about it."""
    test = None
    if options.data is None:
        examples = read_docstrings(progress)
        source = "docstrings; the class is the package they come from"
    else:
        examples = read_tsv(options.data)
        source = f"texts of {options.data}"
        labels = {example.label for example in examples}
        if len(labels) < 2:
            raise DemoError(
                f"{options.data}, line {examples[-1].line}: every label up to this last line is "
                f"{examples[0].label!r}; two are needed"
            )
        if options.test is not None:
            test = read_tsv(options.test)
            for example in test:
                if example.label not in labels:
                    raise DemoError(
                        f"{options.test}, line {example.line}: the label "
                        f"{example.label!r} does not occur in {options.data}"
                    )
    data = prepare(examples, test, options.limit, options.length)
    trained, tested = len(data.train.labels), len(data.test.labels)
    names = ", ".join(data.classes[:20]) + (", ..." if len(data.classes) > 20 else "")
    return data, (
        f"{trained + tested:,} {source}.\n{len(data.classes)} classes: "
        f"{names}.\n{trained:,} to train on, {tested:,} to test."
    )


# Training


def train(
    arm: str,
    data: Data,
    options: argparse.Namespace,
    state: dict[str, Any],
    save: Callable[[], None],
    stop: Callable[[], None],
) -> TextClassifier:
    """Trains one model from `state` on, which after every step that is saved holds all that
    the rest of the run depends on.
    """
    from tqdm import tqdm

    torch.manual_seed(options.seed)
    model: TextClassifier = MODELS[options.model](data.words, len(data.classes))
    optimizer: torch.optim.Optimizer
    if arm == "AdamW":
        optimizer, recipe = (
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True),
            None,
        )
    else:
        optimizer = SelectiveAdamW(model.parameters(), lr=LEARNING_RATE)
        stage = {"epsilon": options.epsilon, "passes": options.passes}
        recipe = recipes.uegr(model, model.embedding, optimizer, **stage)  # type: ignore[attr-defined]
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if recipe is not None:
            recipe.load_state_dict(state["recipe"])
        torch.set_rng_state(state["random"])

    def keep() -> None:
        parts = {"model": model, "optimizer": optimizer} | (
            {} if recipe is None else {"recipe": recipe}
        )
        state.update(
            {name: part.state_dict() for name, part in parts.items()}, random=torch.get_rng_state()
        )
        save()

    total = steps_of(data, options)
    with tqdm(
        total=total, initial=state["step"], desc=f"{arm:<5}", unit="step", mininterval=0.5
    ) as bar:
        while state["step"] < total:
            inputs, labels = data.train.batch(
                rows_of_step(state["step"], len(data.train.labels), options.seed)
            )
            model.train()
            started = time.perf_counter()
            optimizer.zero_grad()
            if recipe is None:
                loss = F.cross_entropy(model(**inputs), labels)
                loss.backward()
            else:
                loss = recipe.backward(inputs, labels)["clean_loss"]
            seconds = time.perf_counter() - started
            if recipe is not None and state["step"] % SHARE_EVERY == 0:
                state["shares"].append(share_selected(optimizer, state["step"] + 1))
            started = time.perf_counter()
            optimizer.step()
            state["seconds"].append(seconds + time.perf_counter() - started)
            state["losses"].append(loss.item())
            state["step"] += 1
            bar.update()
            bar.set_postfix(loss=f"{statistics.fmean(state['losses'][-20:]):.3f}", refresh=False)
            if state["step"] % SAVE_EVERY == 0 or state["step"] == total:
                keep()
            try:
                stop()
            except Stopped:
                keep()
                raise
    if recipe is not None:
        recipe.close()
    return model


def steps_of(data: Data, options: argparse.Namespace) -> int:
    steps: int = options.epochs * math.ceil(len(data.train.labels) / BATCH)
    return min(steps, options.steps or steps)


def rows_of_step(step: int, rows: int, seed: int) -> Tensor:
    """The batch of a step depends on the seed and the step alone, so that a resumed run finds
    the same.
    """
    epoch, batch = divmod(step, math.ceil(rows / BATCH))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)[batch * BATCH : (batch + 1) * BATCH]


def share_selected(optimizer: torch.optim.Optimizer, step: int) -> float:
    """The share of all elements in the very masks that the optimizer is about to use."""
    seed, parameters = optimizer.param_groups[0]["seed"], optimizer.param_groups[0]["params"]
    masks = [
        selection_mask(p.grad, seed=seed, step=step, stream=i) for i, p in enumerate(parameters)
    ]
    return sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def evaluate(model: TextClassifier, texts: Texts, stop: Callable[[], None]) -> list[float]:
    """Accuracy, and accuracy under a one-step L2 attack (Eq. 2) on the embedded words at each
    of ATTACKS, in eval mode.
    """
    model.eval()
    right = [0] * (1 + len(ATTACKS))
    for first in range(0, len(texts.labels), 128):
        stop()
        inputs, labels = texts.batch(slice(first, first + 128))
        mask = inputs["attention_mask"]
        x = model.embedding(inputs["ids"]).detach().requires_grad_()
        logits = model.classify(x, mask)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), x)
        with torch.no_grad():
            attacked = [
                model.classify(x + fgm_perturbation(gradient, epsilon, mask=mask), mask)
                for epsilon in ATTACKS
            ]
        for i, each in enumerate([logits, *attacked]):
            right[i] += int((each.argmax(1) == labels).sum().item())
    return [count / len(texts.labels) for count in right]


# Stopping and going on


@contextlib.contextmanager
def interrupts_noticed() -> Iterator[Callable[[], None]]:
    """Yields what raises Stopped once Ctrl-C was pressed, so that no step is cut in two; a
    second Ctrl-C stops at once.
    """
    pressed: list[int] = []

    def notice(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    def stop() -> None:
        if pressed:
            raise Stopped

    try:
        before = signal.signal(signal.SIGINT, notice)
    except ValueError:  # not the main thread, which alone gets signals
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def save_checkpoint(path: pathlib.Path, checkpoint: dict[str, Any]) -> None:
    """Written aside, then moved: whatever happens, `path` is a whole checkpoint."""
    aside = path.with_suffix(".tmp")
    torch.save(checkpoint, aside)
    os.replace(aside, path)


def load_checkpoint(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
        saved, _ = checkpoint["settings"], checkpoint["arms"]
    except FileNotFoundError:
        raise DemoError(
            f"there is no {path} to resume from; leave --resume out to start anew"
        ) from None
    except Exception:  # whatever a file that is no checkpoint makes torch.load raise
        raise DemoError(
            f"{path} is not a checkpoint of this demo; leave --resume out to start anew"
        ) from None
    different = [
        f"{name} is {value!r} here and {saved.get(name)!r} there"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if different:
        raise DemoError(
            f"{path} belongs to another run: {'; '.join(different)}. Resume with its settings, or "
            "leave --resume out to start anew"
        )
    return checkpoint


def settings_of(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """All that two runs must have in common to give the same bits."""
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.test):
        digest.update(tensor.numpy().tobytes())
    return {
        **{
            f"--{name}": getattr(options, name)
            for name in (
                "model",
                "epochs",
                "seed",
                "epsilon",
                "passes",
                "limit",
                "length",
                "threads",
            )
        },
        "UEGR's dropout": "adaptive",
        "the number of steps": steps_of(data, options),
        "the data's fingerprint": digest.hexdigest()[:12],
        "torch's version": str(torch.__version__),
    }


# Reporting


def table(arms: dict[str, dict[str, Any]]) -> str:
    rows = [("", *ARMS), ("accuracy", *(f"{arms[arm]['accuracy'][0]:.1%}" for arm in ARMS))]
    for i, epsilon in enumerate(ATTACKS, 1):
        rows.append(
            (
                f"accuracy under FGM, epsilon {epsilon:g}",
                *(f"{arms[arm]['accuracy'][i]:.1%}" for arm in ARMS),
            )
        )
    rows.append(
        (
            "seconds per step (median)",
            *(f"{statistics.median(arms[arm]['seconds']):.4f}" for arm in ARMS),
        )
    )
    rows.append(
        ("parameters selected per step", "100 %", f"{statistics.fmean(arms['UEGR']['shares']):.4%}")
    )
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {adamw:>10}  {uegr:>10}" for name, adamw, uegr in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: pathlib.Path, arms: dict[str, dict[str, Any]], title: str) -> None:
    from matplotlib.figure import Figure  # without pyplot there is no window system to ask for

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for arm, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
        losses = arms[arm]["losses"]
        window = max(1, len(losses) // 30)
        left.plot(
            [statistics.fmean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))],
            color=colour,
            label=arm,
        )
        middle.plot(
            (0, *ATTACKS),
            [100 * value for value in arms[arm]["accuracy"]],
            "o-",
            color=colour,
            label=arm,
        )
        bar = right.bar(arm, 1000 * statistics.median(arms[arm]["seconds"]), color=colour)
        right.bar_label(bar, fmt="%.0f")
    left.set(title="Cross-entropy on clean batches", xlabel="step", ylim=(0, None))
    middle.set(title="Test accuracy under FGM (%)", xlabel="attack's epsilon", ylim=(0, 100))
    right.set(title="Milliseconds per step")
    right.margins(y=0.12)  # for the numbers on the bars
    left.legend()
    middle.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


# Options


def parser() -> argparse.ArgumentParser:
    def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
        def parse(text: str) -> Any:
            value = kind(text)
            if not low <= value < high:
                raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
            return value

        parse.__name__ = kind.__name__  # argparse says "invalid int value"
        return parse

    stage = inspect.signature(BiStage).parameters
    parser = argparse.ArgumentParser(
        prog="python -m uegr_kernels demo",
        description="Fine-tunes a text classifier with AdamW and with UEGR, and compares their "
        "accuracy, robustness and cost.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="label<TAB>text lines in UTF-8, gzip if it ends in .gz; "
        "None: this machine's docstrings",
    )
    parser.add_argument(
        "--test", metavar="FILE", help="the same, to test on; None: a fifth of the data is held out"
    )
    parser.add_argument("--model", choices=MODELS, default="textcnn", help="the classifier")
    parser.add_argument(
        "--epochs", type=number(int, 1), default=5, help="times through the data, for each training"
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        help="steps of each training at most; None: all of the epochs",
    )
    parser.add_argument(
        "--limit", type=number(int, 1), help="texts at most, of each file; None: all"
    )
    parser.add_argument(
        "--length", type=number(int, 1, 513), default=64, help="words of a text that are read"
    )
    own = f"length of UEGR's perturbation; BiStage's own default is {stage['epsilon'].default}"
    parser.add_argument("--epsilon", type=number(float, 0), default=0.4, help=own)
    parser.add_argument(
        "--passes",
        type=number(int, 1),
        default=stage["passes"].default,
        help="UEGR's adversarial passes",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32), default=0, help="fixes weights, order and masks"
    )
    # Two threads save a third of the time on two idle cores, and take a hundred times as long where
    # another program wants one of them.
    parser.add_argument(
        "--threads",
        type=number(int, 1),
        default=1,
        help="processors to use; more pay for large models on an idle machine",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="demo_output",
        help="where the picture and the checkpoint go",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --output"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demo on a list of options (None: the command line's); returns the exit status:
    2 wrong input, 130 Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parser().parse_args(argv)
        if options.test is not None and options.data is None:
            parser().error("--test FILE needs --data FILE")
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    again = shlex.join(
        [
            "python",
            "-m",
            "uegr_kernels",
            "demo",
            *(word for word in argv if word != "--resume"),
            "--resume",
        ]
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return run(options, again)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nStopped at once. If training had begun, the last checkpoint is whole; go on "
            "with\n  " + again,
            file=sys.stderr,
        )
        return 130
    finally:
        torch.set_num_threads(threads)


def run(options: argparse.Namespace, again: str) -> int:
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from tqdm import tqdm

    began = time.perf_counter()
    output = pathlib.Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"--output {output}: {error.strerror}; name a folder that can be made"
        ) from None
    path = output / CHECKPOINT
    data, sentence = load(options, tqdm)
    settings = settings_of(options, data)
    if options.resume:
        checkpoint = load_checkpoint(path, settings)
    else:
        if path.exists():
            print(
                f"Starting anew: the checkpoint in {output} will be replaced (--resume would go "
                "on from it)."
            )
        checkpoint = {
            "settings": settings,
            "arms": {
                arm: {"step": 0, "losses": [], "seconds": [], "shares": [], "accuracy": []}
                for arm in ARMS
            },
        }
    arms, total = checkpoint["arms"], settings["the number of steps"]
    print(sentence)
    print(
        f"{options.model}, {total} steps of {BATCH} texts at learning rate {LEARNING_RATE:g}, "
        f"seed {options.seed}, twice:"
    )
    print("  AdamW  torch.optim.AdamW(fused=True) on the cross-entropy")
    print(f"  UEGR   {describe(options)}", flush=True)
    if native.why_not() is not None:
        print(
            "UEGR's optimizer will run in plain PyTorch, many times slower (--steps 100 "
            f"shortens it): {native.why_not()}.",
            flush=True,
        )
    with interrupts_noticed() as stop:
        for arm in ARMS:
            state = arms[arm]
            try:
                if not state["accuracy"]:
                    model = train(
                        arm, data, options, state, lambda: save_checkpoint(path, checkpoint), stop
                    )
                    state["accuracy"] = evaluate(model, data.test, stop)
                    save_checkpoint(path, checkpoint)
            except Stopped:
                print(
                    f"\nStopped in {arm} after step {state['step']} of {total}. All of it is in "
                    f"{path}; go on with\n  {again}",
                    file=sys.stderr,
                )
                return 130
    draw(
        output / PICTURE,
        arms,
        f"{options.model}, {len(data.train.labels):,} texts, {len(data.classes)} classes",
    )
    print(f"\n{table(arms)}\n")
    print(
        "FGM: one step of length epsilon (L2, per text) on the embedded words, where a word "
        "vector had length 1 at the start."
    )
    print(f"Picture: {output / PICTURE}. Time: {time.perf_counter() - began:.0f} s.")
    return 0


def describe(options: argparse.Namespace) -> str:
    """UEGR's settings as they stand in the signatures."""
    defaults = {name: p.default for name, p in inspect.signature(SelectiveAdamW).parameters.items()}
    chosen = ", ".join(
        f"{name}={defaults[name]!r}"
        for name in ("threshold", "sharpness", "normalization", "direction")
    )
    js_weight = inspect.signature(BiStage).parameters["js_weight"].default
    stage = f"BiStage(epsilon={options.epsilon:g}, passes={options.passes}, js_weight={js_weight})"
    return f"{stage}, AdaptiveDropout and SelectiveAdamW({chosen})"
