"""Reads the arguments of `python -m uegr_kernels finetune`, and runs it."""

import argparse
import ast
import contextlib
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from ..core import checks
from ..models import MODELS
from ..recipes import NAMES
from .classifiers import INSTALL, SETTINGS
from .data import UserError
from .interrupts import Stopped
from .tables import shown
from .task import EPSILON, finetune

PROGRAM = "python -m uegr_kernels finetune"
DESCRIPTION = (
    "Fine-tunes a text classifier so that it generalises and withstands attack, and reports what "
    "it withstands."
)


# several names with commas
LISTS = ("--compare", "--text-column")
# a word of other programs' that is not near to ours
ELSEWHERE = {"--learning-rate": "--lr"}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake; argparse itself prints a page before it and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


def parser(
    program: str = PROGRAM, description: str = DESCRIPTION, *, required: bool = True
) -> argparse.ArgumentParser:
    """Returns the command's arguments; `required` False: --train and --output may be left out."""
    top = _Parser(
        prog=program,
        description=description,
        formatter_class=_Help,
        epilog=f"Recipes: {', '.join(NAMES)}. For example: {program} --train reviews.csv "
        "--compare plain,at,r_at_su --output reviews",
    )
    add = top.add_argument
    files = top.add_argument_group("texts", "files .tsv, .csv or .jsonl, each also .gz")
    files.add_argument("--train", metavar="FILE", required=required, help="texts with labels")
    files.add_argument(
        "--validation", metavar="FILE", help="the epoch is chosen by these; else a tenth of --train"
    )
    files.add_argument("--test", metavar="FILE", help="to report on; else a fifth of --train")
    files.add_argument(
        "--shifted",
        metavar="NAME=FILE",
        nargs="+",
        action="extend",
        default=[],
        help="labelled texts of other origins, to report on",
    )
    files.add_argument(
        "--ood",
        metavar="NAME=FILE",
        nargs="+",
        action="extend",
        default=[],
        help="texts that are none of the task's; labels are not needed",
    )
    files.add_argument(
        "--text-column", metavar="A[,B]", default="text", help="the text's column; two for pairs"
    )
    files.add_argument("--label-column", metavar="L", default="label", help="the label's column")
    files.add_argument("--pair-separator", metavar="S", help="what parts a pair in one column")
    files.add_argument("--regression", action="store_true", help="labels are numbers")
    files.add_argument("--limit", metavar="N", type=_integer, help="texts of each file at most")
    add("--model", default="minilm", help=f"a folder, a hub name, minilm, {', '.join(MODELS)}")
    which = top.add_mutually_exclusive_group()
    which.add_argument("--recipe", default="uegr", help="how to train")
    which.add_argument("--compare", metavar="LIST", help="several recipes: plain,at,uegr")
    for name, of in (("recipe", "every recipe that has them"), ("trainer", "TrainingArguments")):
        add(
            f"--{name}-options",
            metavar="K=V",
            nargs="+",
            action="extend",
            default=[],
            help=f"of {of}",
        )
    add("--epsilon", type=_number, default=EPSILON, help="perturbation, in norms of a text")
    seeds = top.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=_integer, default=0, help="of weights, batches and masks")
    seeds.add_argument("--seeds", metavar="N", type=_integer, help="N trainings: 0, 1, ...")
    add("--epochs", type=_number, help="times through the texts; 3, for small models 10")
    add("--lr", type=_number, help="the largest learning rate; 5e-5, for small models 1e-3")
    add("--batch", type=_integer, default=16, help="texts a step, over all processes")
    add("--length", type=_integer, default=128, help="tokens of a text that are read")
    add("--device", choices=("cpu", "cuda"), help="else the GPU where there is one")
    add("--output", metavar="DIR", required=required, help="folder of model and report")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--resume", action="store_true", help="go on with what was stopped")
    return top


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no number; give one in digits, with a point"
        ) from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no integer; give one") from None


def parsed(top: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments of `parser`; raises UserError, with a remedy, for others."""
    options, rest = top.parse_known_args(given)
    if rest:
        names = [f"--{name.replace('_', '-')}" for name in vars(options)]
        top.error(_misplaced(rest[0], [*given], names))
    return options


def _misplaced(word: str, given: list[str], names: Sequence[str]) -> str:
    """Says what is wrong with an argument that has no place, and what to do."""
    if word.startswith("-"):
        name = word.partition("=")[0]
        if name in ELSEWHERE:
            return f"there is no argument {name}; it is {ELSEWHERE[name]} here"
        return f"there is no argument {name}{checks.near(name, names)}"
    place = given.index(word)
    before = next((i for i in reversed(range(place)) if given[i].startswith("--")), None)
    if before is None:
        return f"{shown(word)} stands before any argument's name; write --train {word}"
    option = given[before]
    after = next((i for i in range(place, len(given)) if given[i].startswith("--")), len(given))
    values = given[before + 1 : after]
    if option in LISTS:
        joined = ",".join(value.strip(",") for value in values)
        return f"{option} {' '.join(values)}: names stand without spaces; write {option} {joined}"
    return (
        f"{option} {' '.join(values)}: {shown(word)} is one value too many; put quotes around one "
        "with spaces"
    )


def pairs(option: str, given: Iterable[str], what: str = "VALUE") -> dict[str, str]:
    """Returns NAME=VALUE arguments by name; raises UserError for one without a name or twice."""
    found: dict[str, str] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or not name or not value:
            raise UserError(f"{option} {each}: write NAME={what}, without spaces around the =")
        if name in found:
            raise UserError(f"{option} {each}: {name!r} is given twice")
        found[name] = value
    return found


def values(option: str, given: Iterable[str]) -> dict[str, Any]:
    """Returns K=V arguments by name, each value as Python reads it, else as the string it is."""

    def read(name: str, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if re.search(r",\s*\w+=", text):
                raise UserError(
                    f"{option} {name}={text}: a comma stands between options; write a space in its "
                    "place"
                ) from None
            return {"true": True, "false": False}.get(text, text)

    return {name: read(name, text) for name, text in pairs(option, given).items()}


def keywords_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments as `finetune` takes them."""
    found = vars(options).copy()
    for name in ("shifted", "ood"):
        found[name] = pairs(f"--{name}", found[name], "FILE")
    for name in ("recipe_options", "trainer_options"):
        found[name] = values(f"--{name.replace('_', '-')}", found[name])
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, 1 where every training diverged, 2 for what the reader can mend,
    130 for Ctrl-C.
    """
    try:
        options = parsed(parser(), arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(options, f"{PROGRAM} {shlex.join(arguments)}")


def _going_on(command: str) -> str:
    """Returns the command that goes on with what the given one began."""
    return " ".join(part for part in command.split(" ") if part != "--overwrite") + " --resume"


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Shows the command's own warnings without the place in the code that others have."""
    usual, here = warnings.formatwarning, pathlib.Path(__file__).parent

    def said(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if here in pathlib.Path(filename).parents:
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = said
    try:
        yield
    finally:
        warnings.formatwarning = usual


def run(options: argparse.Namespace, command: str) -> int:
    """Trains with the arguments of `parser`, and prints the report, or what to mend."""
    try:
        from . import train

        train.quiet()
        with _warnings_in_a_line():
            found = finetune(**keywords_of(options), command=command)
    except ImportError as error:
        if error.name is None or error.name.startswith(__name__.partition(".")[0]):
            raise
        print(f"error: {error.name} is not installed: {INSTALL}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped:
        again = command if options.resume else _going_on(command)
        print(f"\nStopped; what is done is kept. Go on with\n  {again}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nStopped; nothing is trained yet.", file=sys.stderr)
        return 130
    if not train.is_first_process():
        return 0
    print(pathlib.Path(options.output, "report.md").read_text(encoding="utf-8"))
    pair = options.pair_separator is not None or "," in options.text_column
    print(_whereabouts(pathlib.Path(options.output), found["runs"], pair=pair))
    return 0 if found["measures"] else 1


def _whereabouts(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]], *, pair: bool) -> str:
    """Says where models and report lie, and how a model is used on a text or a pair of them."""
    kept = [
        folder / run["recipe"] / str(run["seed"]) if len(runs) > 1 else folder
        for run in runs
        if run["outcomes"]["predicted"]
    ]
    if not kept:
        return f"Report: {folder / 'report.md'}, {folder / 'report.json'}"
    lines = [
        f"Model{'s' * (len(kept) > 1)}: {', '.join(map(str, kept))}",
        f"Report: {folder / 'report.md'}, {folder / 'report.json'}, {folder / 'report.png'}",
        "Use a model in Python:",
    ]
    if (kept[-1] / SETTINGS).exists():
        lines += [
            "  from uegr_kernels.finetune import classifiers",
            f"  classifier = classifiers.load({str(kept[-1])!r})",
            f"  batch = classifier.pad(classifier.encode([{('A text.', 'B')[: 1 + pair]}]))",
            "  classifier.model.eval()(**batch)  # logits of classifier.labels, or a number",
        ]
    else:
        text = {"text": "A text.", "text_pair": "B"} if pair else "A text."
        lines += [
            "  from transformers import pipeline",
            f"  pipeline('text-classification', {str(kept[-1])!r}, truncation=True)({text!r})",
        ]
    return "\n".join(lines)
