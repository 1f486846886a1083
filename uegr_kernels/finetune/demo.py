"""Runs the demo, the main job on real text: fine-tunes one classifier with AdamW and with UEGR,
then compares accuracy, robustness and cost.
"""

import argparse
import hashlib
import importlib.util
import inspect
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from .. import BiStage
from ..models import MODELS
from . import data as texts
from . import demo_report as report
from .data import Data, UserError
from .demo_training import (
    ARMS,
    BATCH,
    LEARNING_RATE,
    Arm,
    Settings,
    Stopped,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    steps_of,
    stops_on_interrupt,
    train,
)

N = TypeVar("N", int, float)
CHECKPOINT, PICTURE = "checkpoint.pt", "demo.png"


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the demo's options."""

    def number(kind: type[N], low: float, high: float = math.inf) -> Callable[[str], N]:
        def parse(text: str) -> N:
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


def main(argv: list[str] | None = None, why_slow: Callable[[], str | None] = lambda: None) -> int:
    """Runs the demo on a list of options (None: the command line's); returns the exit status:
    2 wrong input, 130 Ctrl-C.

    why_slow  says why UEGR's optimizer will run in plain PyTorch, or returns None: it will not
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
        return run(options, again, why_slow)
    except UserError as error:
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


def run(options: argparse.Namespace, again: str, why_slow: Callable[[], str | None]) -> int:
    """Trains what is missing of both models and reports; returns the exit status."""
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from tqdm import tqdm

    began = time.perf_counter()
    output = pathlib.Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output}: {error.strerror}; name a folder that can be made"
        ) from None
    path = output / CHECKPOINT
    source = texts.Source(options.data, options.test, options.limit, options.length)
    data, sentence = texts.load(source, tqdm)
    total = steps_of(data, options.epochs, options.steps)
    settings = settings_of(options, data, total)
    if options.resume:
        arms = load_checkpoint(path, settings)
    else:
        if path.exists():
            print(
                f"Starting anew: the checkpoint in {output} will be replaced (--resume would go "
                "on from it)."
            )
        arms = {name: Arm() for name in ARMS}
    print(sentence)
    print(
        f"{options.model}, {total} steps of {BATCH} texts at learning rate {LEARNING_RATE:g}, "
        f"seed {options.seed}, twice:"
    )
    print("  AdamW  torch.optim.AdamW(fused=True) on the cross-entropy")
    print(f"  UEGR   {report.describe(options.epsilon, options.passes)}", flush=True)
    if (slow := why_slow()) is not None:
        print(
            "UEGR's optimizer will run in plain PyTorch, many times slower (--steps 100 "
            f"shortens it): {slow}.",
            flush=True,
        )
    how = Settings(options.model, total, options.seed, options.epsilon, options.passes)

    def save() -> None:
        saved = {name: arm.saved() for name, arm in arms.items()}
        save_checkpoint(path, {"settings": settings, "arms": saved})

    with stops_on_interrupt() as stop:
        for name, arm in arms.items():
            try:
                if not arm.accuracy:
                    model = train(name, data, how, arm, save, stop)
                    arm.accuracy = evaluate(model, data.test, stop)
                    save()
            except Stopped:
                print(
                    f"\nStopped in {name} after step {arm.step} of {total}. All of it is in "
                    f"{path}; go on with\n  {again}",
                    file=sys.stderr,
                )
                return 130
    report.draw(
        output / PICTURE,
        arms,
        f"{options.model}, {len(data.train.labels):,} texts, {len(data.classes)} classes",
    )
    print(f"\n{report.comparison(arms)}\n")
    print(
        "FGM: one step of length epsilon (L2, per text) on the embedded words, where a word "
        "vector had length 1 at the start."
    )
    print(f"Picture: {output / PICTURE}. Time: {time.perf_counter() - began:.0f} s.")
    return 0


def settings_of(options: argparse.Namespace, data: Data, steps: int) -> dict[str, object]:
    """Returns all that two runs must have in common to give the same bits."""
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
        "the number of steps": steps,
        "the data's fingerprint": digest.hexdigest()[:12],
        "torch's version": str(torch.__version__),
    }
