"""Runs the suites: `python -m bench` lists them, `python -m bench SUITE ...` runs one or several,
`python -m bench docs` puts the figures into the documents.
"""

import argparse
import ast
import importlib
import itertools
import pathlib
import shlex
import sys
import time
from collections.abc import Callable

import torch

from . import harness, machine, pages, plot, sharded_model
from .tables import origins, results

HERE = pathlib.Path(__file__).parent
SUITES = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something disagreed, 2 for wrong arguments, 130 for
    Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    suites = list(itertools.takewhile(SUITES.__contains__, arguments))
    if len(suites) > 1:
        worst = 0
        for suite in dict.fromkeys(suites):
            worst = max(worst, main([suite, *arguments[len(suites) :]]))
            if worst == 130:
                break
        return worst
    top = argparse.ArgumentParser(
        prog="python -m bench", description="Times the operators beside their peers."
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, path in SUITES.items():
        suite = commands.add_parser(
            name, help=described(path), description=f"Runs the suite {name}."
        )
        suite.add_argument(
            "--device",
            choices=("cpu", "cuda"),
            default="cpu",
            help="where the tensors lie; default: cpu",
        )
        suite.add_argument(
            "--quick",
            action="store_true",
            help="small sizes and few rounds, to see that it runs: a matter of seconds",
        )
        suite.add_argument(
            "--output",
            metavar="DIR",
            type=pathlib.Path,
            help="default: bench/results, with --quick build/bench",
        )
        suite.add_argument(
            "--rounds",
            metavar="N",
            type=harness.count,
            help="how often ours and each peer take turns; default 20, with --quick 3",
        )
        suite.add_argument(
            "--threads",
            metavar="N",
            type=harness.count,
            help=f"default: torch's own, {torch.get_num_threads()} here",
        )
        suite.add_argument(
            "--only",
            metavar="TEXT",
            default="",
            help="only the cases whose name contains TEXT; the others keep their results",
        )
        suite.add_argument(
            "--without",
            metavar="TEXT",
            help="no peers whose name contains TEXT: they are listed as missing",
        )
        suite.add_argument(
            "--wait",
            metavar="SECONDS",
            type=float,
            help="in all, for a busy machine to calm down; default 600; with --quick nothing waits "
            "and results are kept however busy it was",
        )
    sharded_model.add_arguments(
        commands.add_parser(
            "sharded", help="a model on paper of the step in sharded training, as a table"
        )
    )
    figures = commands.add_parser("docs", help="put the figures of bench/results into docs/")
    figures.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit status 1 where a document does not agree",
    )
    options = top.parse_args(arguments)
    if options.command is None:
        print(
            "\n".join(
                ["Suites:", *(f"  {name:<14}{described(path)}" for name, path in SUITES.items())]
            )
        )
        print(
            "Run one or several with `python -m bench SUITE ...`; `python -m bench SUITE "
            "--help` lists the options."
        )
        print(
            "`docs` in the place of SUITE updates the documents, `sharded` prints a model on "
            "paper; `make gpu` does what needs a GPU."
        )
        return 0
    if options.command == "docs":
        return pages.update(options.check)
    if options.command == "sharded":
        print(sharded_model.comparison(sharded_model.from_arguments(options)))
        return 0
    if options.device == "cuda" and (reason := machine.no_gpu()):
        print(f"--device cuda needs a GPU: {reason}; or use --device cpu", file=sys.stderr)
        return 2
    try:
        with machine.threads(options.threads):
            return run(options, shlex.join(["python", "-m", "bench", *arguments]))
    except KeyboardInterrupt:
        print(
            "\nStopped. The results of the finished cases are kept; --only TEXT runs the rest.",
            file=sys.stderr,
        )
        return 130


def described(path: pathlib.Path) -> str:
    """Returns what a suite says of itself, in one line."""
    return " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())


class Patience:
    """Measures what was quiet: waits for other programs, so many seconds in all, and repeats what
    they came into.
    """

    TRIES = 5

    def __init__(self, seconds: float):
        self.left = seconds

    def quiet(self, measure: Callable[[], dict]) -> dict | None:
        """Returns a record that nobody disturbed, or None where the machine stays busy."""
        for _ in range(self.TRIES):
            began = time.monotonic()
            busy = machine.wait_until_quiet(self.left)
            self.left = max(0.0, self.left - (time.monotonic() - began))
            if busy:
                return None
            record = measure()
            if machine.is_quiet(record.get("others_cpus")):
                return record
        return None


def repeated(options: argparse.Namespace, case: str) -> list[str]:
    """Returns the command that runs one case of a suite again."""
    device = [] if options.device == "cpu" else ["--device", options.device]
    return ["python", "-m", "bench", options.command, *device, "--only", case]


def run(options: argparse.Namespace, command: str) -> int:
    """Runs a suite's cases and writes what was quiet; returns the exit status."""
    rounds = options.rounds or (3 if options.quick else 20)
    output = options.output or (HERE.parent / "build" / "bench" if options.quick else pages.RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{options.command}-{options.device}.jsonl"
    cases = importlib.import_module(f".{SUITES[options.command].stem}", __package__).cases(
        options.quick, options.device
    )
    chosen = [case for case in cases if options.only in case.name]
    if not chosen:
        print(
            f"--only {options.only!r} matches none of: {', '.join(case.name for case in cases)}",
            file=sys.stderr,
        )
        return 2
    about = {
        "suite": options.command,
        "quick": options.quick,
        **harness.environment(command, options.device),
    }
    size = 2**26 if options.quick else 2**28 if options.device == "cpu" else 2**30
    copy, records, wrong = machine.Copy(size, options.device), [], []
    patience = None if options.quick else Patience(600.0 if options.wait is None else options.wait)
    everything = harness.read(path)
    with harness.progress(rounds * len(chosen)) as tick:
        for case in chosen:
            tick(case.name, 0)

            def measure(case: harness.Case = case) -> dict:
                return about | harness.measure(
                    case, rounds, copy, lambda: tick(case.name, 1), options.without
                )

            record = patience.quiet(measure) if patience else measure()
            if record is None:
                wrong.append(
                    f"{case.name}: the machine was busy; what there was of it stays. Run again "
                    f"when it is quiet: {shlex.join(repeated(options, case.name))}"
                )
                continue
            if "contestants" not in record:
                tick(case.name, rounds)
            records.append(record)
            wrong += [
                f"{case.name}: {record[key]}" for key in ("error", "skipped") if key in record
            ]
            everything = harness.keep(path, record, [each.name for each in cases])
            path.with_suffix(".md").write_text(
                f"# {options.command}\n\n{results(everything)}\n\n{origins(everything)}\n"
            )
    if records:
        drawn = plot.pictures(path, everything)
        written = ", ".join(map(str, [path, path.with_suffix(".md"), *drawn]))
        print(f"{results(records)}\n\n{origins(records)}\n\nWritten: {written}")
    print(
        "".join(f"\nno figure for {reason}" for reason in wrong),
        end="\n" if wrong else "",
        file=sys.stderr,
    )
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
