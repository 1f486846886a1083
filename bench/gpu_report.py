"""What a run on a GPU says: a line as each stage ends, a table at the end, a picture. Imports
no torch.
"""

import json
import os
import pathlib
import subprocess
import sys

from . import plot, tables
from .gpu_runner import ROOT, Output

LINES, CHARACTERS = 98, 12_000  # of the table at most: with its heading gpu.md has 100
WIDTH = 300  # of a line's message
PICTURE = 6.0  # seconds
FACTS = ("gpu", "driver", "torch", "cuda", "triton", "python", "commit", "processors", "l2", "nvcc")


def say(text: str) -> None:
    """To whoever listens: a terminal or a pipe that is gone ends nothing."""
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(coding, "backslashreplace").decode(coding), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def show(line: dict) -> None:
    """As the stage ends. What cannot be shown is in gpu.jsonl, and ends nothing."""
    if "not_kept" in line:
        say(line["not_kept"])
    try:
        say(words(line))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        say(
            f"{line['stage']} {line['status']} (its answer is not as expected: "
            f"{type(error).__name__}: {error})"
        )


def words(line: dict) -> str:
    """The probe's are what the machine is and how fast it copies, and come first."""
    result = line.get("result", {})
    facts = []
    if "copy_rate" in result:
        facts = [
            f"A copy moves {result['copy_rate']:,.0f} GB/s, bytes read plus bytes written.",
            machine(result),
        ]
    about = (
        line["stage"],
        line["status"],
        seconds(line),
        line.get("message", "")[:WIDTH],
        brief(result),
    )
    return "\n".join([*facts, " ".join(filter(None, about))])


def seconds(line: dict) -> str:
    return f"{line['seconds']:.1f} s" if "seconds" in line else ""


def machine(result: dict) -> str:
    """The probe's facts in a line."""
    return "; ".join(f"{name} {result[name]}" for name in FACTS if result.get(name) is not None)


def brief(result: dict) -> str:
    """The figures of a case, or the count of tests."""
    if "contestants" in result:
        first, *others = [one for one in result["contestants"] if "seconds" in one]
        ratios = [
            f"{one['ours_over_this']['median']:.3f} of {one['name']}"
            for one in others
            if "ours_over_this" in one
        ]
        share = [f"{first['copy_share']:.0%} of a copy"] if first["bytes"] else []
        return ", ".join([f"{1e6 * first['seconds']['median']:,.1f} us", *share, *ratios])
    if "expected" in result:
        failed = result.get("failed", [])
        named = f": {', '.join(failed[:3])}" if failed else ""
        if "collected" in result:
            return f"{result['collected']} of {result['expected']} tests collected"
        return (
            f"{result.get('passed', 0)} of {result['expected']} tests passed, {len(failed)} "
            f"failed{named}"
        )
    return str(result.get("skipped") or result.get("said") or "")[:WIDTH]


def close(output: Output, status: int) -> str:
    """Writes gpu.md and gpu.png from gpu.jsonl; returns the table."""
    try:
        text = table(latest(output.folder, output.run), output.run, status)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = (
            f"No table: an answer in gpu.jsonl is not as expected ({type(error).__name__}: "
            f"{error}). Exit status {status}."
        )
    try:
        output.write("gpu.md", f"# GPU\n\n{text}\n".encode(errors="backslashreplace"))
        subprocess.run(
            [sys.executable, "-m", __name__, str(output.folder.absolute()), output.run],
            cwd=ROOT,
            timeout=PICTURE,
            capture_output=True,
        )
    except (subprocess.TimeoutExpired, OSError) as error:  # the figures are there without them
        say(f"no gpu.md or no picture: {error}")
    return text


def latest(folder: pathlib.Path, run: str) -> list[dict]:
    """The last line of each stage: of this run, or of an earlier one in the same folder that
    found something.
    """
    stages: dict[str, dict] = {}
    for line in read(folder / "gpu.jsonl"):
        if (
            line["stage"] not in stages
            or "seconds" in line
            or "seconds" not in stages[line["stage"]]
        ):
            stages[line["stage"]] = line
    return [readable(line) for line in stages.values() if line["run"] == run or "seconds" in line]


def readable(line: dict) -> dict:
    """A line as it is, or without an answer that the table has no words for."""
    try:
        words(line), stage_rows([line], ""), case_rows([line])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        without = {key: value for key, value in line.items() if key != "result"}
        return without | {
            "message": f"its answer is not as expected ({type(error).__name__}: {error})"
        }
    return line


def read(path: pathlib.Path) -> list[dict]:
    """Every whole line."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # of a run that was killed while it wrote
            continue
    return [line for line in lines if isinstance(line, dict) and "stage" in line]


def measured(lines: list[dict]) -> list[dict]:
    """The results of cases, each under its stage's name."""
    return [
        line["result"] | {"case": f"{line['stage']}: {line['result']['case']}"}
        for line in lines
        if "contestants" in line.get("result", {})
    ]


def table(lines: list[dict], run: str, status: int) -> str:
    """At most LINES lines and CHARACTERS characters: the machine, what became of the stages,
    the figures of the cases.
    """
    texts = [cell(f"Stopped: {line['message']}") for line in lines if line["stage"] == "end"]
    for result in [line["result"] for line in lines if "copy_rate" in line.get("result", {})][:1]:
        texts.append(f"A copy moves {result['copy_rate']:,.0f} GB/s. {machine(result)}")
    passed = [line["stage"] for line in lines if line["status"] == "passed" and line["run"] == run]
    texts.append(f"Passed: {', '.join(passed) or 'nothing'}. Exit status {status}.")
    return fitted([*texts, *stage_rows(lines, run), *case_rows(lines)])


def stage_rows(lines: list[dict], run: str) -> list[str]:
    """What has not simply passed, and what a stage says in words."""
    rows = []
    for line in lines:
        result = line.get("result", {})
        said = "" if "contestants" in result else brief(result)[:200]
        if line["stage"] != "end" and (line["status"] != "passed" or said or "message" in line):
            earlier = f" (run {line['run']})" if line["run"] != run else ""
            words = ". ".join(filter(None, (line.get("message", "")[:150], said)))
            rows.append(
                f"| {cell(line['stage'])}{earlier} | {line['status']} | {seconds(line)} | "
                f"{cell(words)} |"
            )
    return ["", "| stage | | | |", "| --- | --- | --- | --- |", *rows] if rows else []


def case_rows(lines: list[dict]) -> list[str]:
    rows = []
    for case in measured(lines):
        for i, one in enumerate(case["contestants"]):
            name = cell(case["case"]) if i == 0 else ""
            if one.get("missing", "").startswith("left out by"):
                continue
            if "seconds" not in one:
                rows.append(
                    f"| {name} | {one['name']} | missing: {cell(one['missing'][:80])} | | |"
                )
                continue
            ratio = tables.cell(one["ours_over_this"]) if "ours_over_this" in one else ""
            share = f"{one['copy_share']:.0%}" if one["bytes"] else "-"
            parts = "".join(
                f", {part} {1e6 * value['median']:.4g}"
                for part, value in one.get("parts", {}).items()
            )
            rows.append(
                f"| {name} | {one['name']} | {tables.cell(one['seconds'], 1e6)}{parts} | "
                f"{ratio} | {share} |"
            )
    head = [
        "",
        "| case | | us (quartiles) | ours / this | of a copy |",
        "| --- | --- | --- | --- | --- |",
    ]
    return [*head, *rows] if rows else []


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def fitted(texts: list[str]) -> str:
    """As many of the lines as there is room for, and how many are left out."""
    room, kept = CHARACTERS - 80, []
    for text in (" ".join(text.splitlines()) for text in texts):
        room -= len(text) + 1
        if room < 0 or len(kept) == LINES - 1:
            return "\n".join([*kept, f"({len(texts) - len(kept)} lines more are in gpu.jsonl)"])
        kept.append(text)
    return "\n".join(kept)


if __name__ == "__main__":  # a process of its own: a picture that hangs or fails costs nothing else
    where = pathlib.Path(sys.argv[1])
    plot.pictures(where / "gpu.jsonl", measured(latest(where, sys.argv[2])))
