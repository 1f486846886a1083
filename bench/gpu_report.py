"""Tells what a run on a GPU found: a line as each stage ends, a table at the end, a picture.
Imports no torch.
"""

import json
import os
import pathlib
import subprocess
import sys

from . import plot, tables
from .gpu_runner import ROOT, Output

# of the table at most: with its heading gpu.md has 100
LINES, CHARACTERS = 98, 12_000
# of a line's message
WIDTH = 300
# seconds
PICTURE = 6.0
MODEL = ROOT / "bench/results/gpu_model.json"
# What is calculated of a stage's first contestant: the kernels that it runs one after another, by
# their names in the model. Of a forward and a backward the latter, whose share is the smaller one.
CALCULATED = {
    "bench-step": ("AdamW, float32",),
    "bench-previous": ('AdamW, float32, "previous"',),
    "bench-bfloat16": ('AdamW, all bfloat16, "previous"',),
    "bench-1e9": ("AdamW, float32",),
    "bench-loss-32000": ("loss, bfloat16, C = 32,000",),
    "bench-loss-32000-float32": ("loss, float32, C = 32,000",),
    "bench-dropout": ("dropout, bfloat16, backward",),
    "bench-fgm": ("FGM, float32, the norm", "FGM, float32, the step"),
}
FACTS = ("gpu", "driver", "torch", "cuda", "triton", "python", "commit", "processors", "l2", "nvcc")


def say(text: str) -> None:
    """Prints to whoever listens: a terminal or a pipe that is gone ends nothing."""
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(coding, "backslashreplace").decode(coding), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def show(record: dict) -> None:
    """Shows a stage as it ends. What cannot be shown is in gpu.jsonl, and ends nothing."""
    if "not_kept" in record:
        say(record["not_kept"])
    try:
        say(words(record))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        say(
            f"{record['stage']} {record['status']} (its answer is not as expected: "
            f"{type(error).__name__}: {error})"
        )


def words(record: dict) -> str:
    """Tells of a stage in words; the probe's are what the machine is and how fast it copies, and
    come first.
    """
    result = record.get("result", {})
    facts = []
    if "copy_rate" in result:
        facts = [
            f"A copy moves {result['copy_rate']:,.0f} GB/s, bytes read plus bytes written.",
            machine(result),
        ]
    about = (
        record["stage"],
        record["status"],
        seconds(record),
        record.get("message", "")[:WIDTH],
        brief(result),
    )
    return "\n".join([*facts, " ".join(filter(None, about))])


def seconds(record: dict) -> str:
    return f"{record['seconds']:.1f} s" if "seconds" in record else ""


def machine(result: dict) -> str:
    """Tells the probe's facts in a line."""
    return "; ".join(f"{name} {result[name]}" for name in FACTS if result.get(name) is not None)


def brief(result: dict) -> str:
    """Tells the figures of a case, or the count of tests."""
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
        text = closing(latest(output.folder, output.run), output.run, status)
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
    except (subprocess.TimeoutExpired, OSError) as error:
        # the figures are there without them
        say(f"no gpu.md or no picture: {error}")
    return text


def latest(folder: pathlib.Path, run: str) -> list[dict]:
    """Returns the last record of each stage: of this run, or of an earlier one in the same folder
    that found something.
    """
    stages: dict[str, dict] = {}
    for record in read(folder / "gpu.jsonl"):
        if (
            record["stage"] not in stages
            or "seconds" in record
            or "seconds" not in stages[record["stage"]]
        ):
            stages[record["stage"]] = record
    return [
        readable(record)
        for record in stages.values()
        if record["run"] == run or "seconds" in record
    ]


def readable(record: dict) -> dict:
    """Returns a record as it is, or without an answer that the table has no words for."""
    try:
        words(record), stage_rows([record], ""), case_rows([record])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        without = {key: value for key, value in record.items() if key != "result"}
        return without | {
            "message": f"its answer is not as expected ({type(error).__name__}: {error})"
        }
    return record


def read(path: pathlib.Path) -> list[dict]:
    """Reads every whole record."""
    records = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(text))
        except ValueError:
            # of a run that was killed while it wrote
            continue
    return [record for record in records if isinstance(record, dict) and "stage" in record]


def measured(records: list[dict]) -> list[dict]:
    """Returns the results of cases, each under its stage's name."""
    return [
        record["result"] | {"case": f"{record['stage']}: {record['result']['case']}"}
        for record in records
        if "contestants" in record.get("result", {})
    ]


def closing(records: list[dict], run: str, status: int) -> str:
    """Tells in at most LINES lines and CHARACTERS characters: the machine, what became of the
    stages, the figures of the cases.
    """
    texts = [
        cell(f"Stopped: {record['message']}") for record in records if record["stage"] == "end"
    ]
    for result in [
        record["result"] for record in records if "copy_rate" in record.get("result", {})
    ][:1]:
        texts.append(f"A copy moves {result['copy_rate']:,.0f} GB/s. {machine(result)}")
    passed = [
        record["stage"]
        for record in records
        if record["status"] == "passed" and record["run"] == run
    ]
    texts.append(f"Passed: {', '.join(passed) or 'nothing'}. Exit status {status}.")
    return fitted([*texts, *stage_rows(records, run), *case_rows(records)])


def stage_rows(records: list[dict], run: str) -> list[str]:
    """Tells what has not simply passed, and what a stage says in words."""
    rows = []
    for record in records:
        result = record.get("result", {})
        said = "" if "contestants" in result else brief(result)[:200]
        if record["stage"] != "end" and (
            record["status"] != "passed" or said or "message" in record
        ):
            earlier = f" (run {record['run']})" if record["run"] != run else ""
            words = ". ".join(filter(None, (record.get("message", "")[:150], said)))
            name = cell(record["stage"]) + earlier
            rows.append([name, record["status"], seconds(record), cell(words)])
    return ["", *tables.table(["stage", "", "", ""], rows).split("\n")] if rows else []


def calculated(records: list[dict]) -> dict[str, float]:
    """Returns by stage which share of a copy's rate the model gives it on the GPU of the probe:
    the bytes that the last of its kernels moves, in the time of all.
    """
    names = [record.get("result", {}).get("gpu") for record in records]
    gpu = next((name for name in names if isinstance(name, str)), "")
    lines = json.loads(MODEL.read_text())["records"] if gpu and MODEL.exists() else []
    found = {line["case"]: line for line in lines if line["gpu"].split()[0] in gpu.split()}
    shares = {}
    for stage, names in CALCULATED.items():
        run = [found[name] for name in names if name in found]
        if len(run) == len(names):
            shares[stage] = run[-1]["bytes"] / sum(line["bytes"] / line["share"] for line in run)
    return shares


def case_rows(records: list[dict]) -> list[str]:
    """Tells the figures of the cases, a row per contestant; of the first what was calculated."""
    rows, shares = [], calculated(records)
    for case in measured(records):
        for i, one in enumerate(case["contestants"]):
            name = cell(case["case"]) if i == 0 else ""
            if one.get("missing", "").startswith("left out by"):
                continue
            if "seconds" not in one:
                rows.append([name, one["name"], f"missing: {cell(one['missing'][:80])}"])
                continue
            ratio = tables.cell(one["ours_over_this"]) if "ours_over_this" in one else ""
            share = f"{one['copy_share']:.0%}" if one["bytes"] else "-"
            stage = case["case"].split(":")[0]
            if i == 0 and stage in shares:
                share += f" ({shares[stage]:.0%} calculated)"
            parts = "".join(
                f", {part} {1e6 * value['median']:.4g}"
                for part, value in one.get("parts", {}).items()
            )
            times = tables.cell(one["seconds"], 1e6) + parts
            rows.append([name, one["name"], times, ratio, share])
    heads = ["case", "", "us (quartiles)", "ours / this", "of a copy"]
    return ["", *tables.table(heads, rows).split("\n")] if rows else []


def cell(text: str) -> str:
    """Makes a text fit for a cell."""
    return text.replace("|", "/").replace("\n", " ")


def fitted(texts: list[str]) -> str:
    """Returns as many of the lines as there is room for, and how many are left out."""
    room, kept = CHARACTERS - 80, []
    for text in (" ".join(text.splitlines()) for text in texts):
        room -= len(text) + 1
        if room < 0 or len(kept) == LINES - 1:
            return "\n".join([*kept, f"({len(texts) - len(kept)} lines more are in gpu.jsonl)"])
        kept.append(text)
    return "\n".join(kept)


# a process of its own: a picture that hangs or fails costs nothing else
if __name__ == "__main__":
    where = pathlib.Path(sys.argv[1])
    plot.pictures(where / "gpu.jsonl", measured(latest(where, sys.argv[2])))
