"""Runs the suites: `python -m bench` lists them, `python -m bench SUITE` runs one, `python -m bench
readme` puts the figures into README.md.
"""

import argparse
import ast
import importlib
import pathlib
import shlex
import sys

import torch

from . import harness, machine, plot, readme, sharded_model
from .tables import origins, results

HERE = pathlib.Path(__file__).parent
SUITES = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something disagreed, 2 for wrong arguments, 130 for
    Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
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
            type=_count,
            help="how often ours and each peer take turns; default 20, with --quick 3",
        )
        suite.add_argument(
            "--threads",
            metavar="N",
            type=_count,
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
            help="for a busy machine to calm down; default 120, with --quick 0",
        )
    sharded_model.add_arguments(
        commands.add_parser(
            "sharded", help="a model on paper of the step in sharded training, as a table"
        )
    )
    figures = commands.add_parser("readme", help="put the figures of bench/results into README.md")
    figures.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit status 1 where README.md does not agree",
    )
    options = top.parse_args(arguments)
    if options.command is None:
        print(
            "\n".join(
                ["Suites:", *(f"  {name:<14}{described(path)}" for name, path in SUITES.items())]
            )
        )
        print(
            "Run one with `python -m bench SUITE`; `python -m bench SUITE --help` lists the "
            "options."
        )
        print(
            "`readme` in the place of SUITE updates README.md, `sharded` prints a model on "
            "paper; `make gpu` does what needs a GPU."
        )
        return 0
    if options.command == "readme":
        return readme.update(options.check)
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


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def run(options: argparse.Namespace, command: str) -> int:
    rounds = options.rounds or (3 if options.quick else 20)
    output = options.output or (
        HERE.parent / "build" / "bench" if options.quick else readme.RESULTS
    )
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
    wait = (0.0 if options.quick else 120.0) if options.wait is None else options.wait
    if warning := machine.wait_until_quiet(wait):
        print(f"warning: {warning}", file=sys.stderr)
    about = {
        "suite": options.command,
        "quick": options.quick,
        **harness.environment(command, options.device),
        "warning": warning,
    }
    size = 2**26 if options.quick else 2**28 if options.device == "cpu" else 2**30
    copy, records, wrong = machine.Copy(size, options.device), [], []
    with harness.progress(rounds * len(chosen)) as tick:
        for case in chosen:
            tick(case.name, 0)
            record = about | harness.measure(
                case, rounds, copy, lambda name=case.name: tick(name, 1), options.without
            )
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
