"""Runs the demo: `finetune` on this machine's docstrings, AdamW beside UEGR."""

import importlib.util
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from . import command
from .classifiers import INSTALL, MINILM
from .data import UserError, read_docstrings

COMPARE = "plain,uegr"
# What teaches AdamW the task in two minutes of a slow core: a pre-trained model learns from a few
# texts, at a rate above the command's; the small ones learn from many.
PRETRAINED = {"epochs": 2.0, "lr": 2e-4, "length": 48}
SMALL = {"epochs": 5.0, "length": 64}
# packages, and docstrings of each
FEW, MANY = (4, 100), (20, 300)


def main(argv: Sequence[str], why_slow: Callable[[], str | None] = lambda: None) -> int:
    """Runs the demo with the command's arguments, all of which have a default here; returns its
    exit status.

    why_slow  says why UEGR's optimizer will run in plain PyTorch, or returns None: it will not
    """
    from ..models import MODELS

    began = time.perf_counter()
    parser = command.parser(
        "python -m uegr_kernels demo",
        "Fine-tunes a text classifier with AdamW and with UEGR, on this machine's docstrings "
        "(which package is it from?) or on your own texts, and compares what they withstand.",
        required=False,
    )
    lacking = importlib.util.find_spec(MINILM) is None
    model = "textcnn" if lacking else "minilm"
    parser.set_defaults(model=model, output="demo_output", recipe=None)
    try:
        small = command.parsed(parser, argv).model in MODELS
        parser.set_defaults(**(SMALL if small else PRETRAINED))
        options = command.parsed(parser, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.recipe is None and options.compare is None:
        options.compare = COMPARE
    if lacking and options.model == "textcnn":
        print(f"The pre-trained model's package is not installed ({INSTALL}): TextCNN is taken.")
    if (slow := why_slow()) is not None:
        print(f"UEGR's optimizer will run in plain PyTorch, many times slower: {slow}.")
    folder = pathlib.Path(options.output)
    options.output = folder / "models"
    options.overwrite = not options.resume
    again = shlex.join(["python", "-m", "uegr_kernels", "demo", *argv])
    if options.train is None:
        try:
            options.train = _docstrings(folder, MANY if small else FEW, options.resume)
        except ImportError as error:
            print(f"error: {error.name} is not installed: {INSTALL}", file=sys.stderr)
            return 2
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: --output {folder}: {error.strerror}; name a folder", file=sys.stderr)
            return 2
    status = command.run(options, again)
    if status == 0:
        print(f"Time: {time.perf_counter() - began:.0f} s.")
        print("With texts of your own: python -m uegr_kernels finetune --train FILE --output DIR")
    return status


def _docstrings(folder: pathlib.Path, count: tuple[int, int], there: bool) -> str:
    """Writes docstrings as a file of texts, or leaves the one that is there; returns its name."""
    from tqdm import tqdm

    path = folder / "docstrings.tsv"
    if not (there and path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [("label", "text"), *read_docstrings(*count, tqdm)]
        path.write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
    return str(path)
