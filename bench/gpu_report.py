"""What a run on a GPU says: a line as each stage ends, a table at the end, a picture. Imports no torch."""

import json
import pathlib
import subprocess
import sys

from . import plot, tables
from .gpu_runner import ROOT, Output

LINES, CHARACTERS = 100, 12_000  # of the table at most
WIDTH = 300  # of a line's message
PICTURE = 6.0  # seconds
FACTS = ("gpu", "driver", "torch", "cuda", "triton", "python", "commit", "processors", "l2", "nvcc")


def show(line: dict) -> None:
    """As the stage ends; the probe's is what the machine is and how fast it copies."""
    result = line.get("result", {})
    if "copy_gb_s" in result:
        print(f"A copy moves {result['copy_gb_s']:,.0f} GB/s, bytes read plus bytes written.")
        print(machine(result), flush=True)
    print(" ".join(filter(None, (line["stage"], line["status"], seconds(line), line.get("message", "")[:WIDTH], brief(result)))), flush=True)


def seconds(line: dict) -> str:
    return f"{line['seconds']:.1f} s" if "seconds" in line else ""


def machine(result: dict) -> str:
    """The probe's facts in a line."""
    return "; ".join(f"{name} {result[name]}" for name in FACTS if result.get(name) is not None)


def brief(result: dict) -> str:
    """The figures of a case, or the count of tests."""
    if "contestants" in result:
        first, *others = [one for one in result["contestants"] if "seconds" in one]
        ratios = [f"{one['ours_over_this']['median']:.3f} of {one['name']}" for one in others if "ours_over_this" in one]
        share = [f"{first['copy_share']:.0%} of a copy"] if first["bytes"] else []
        return ", ".join([f"{1e6 * first['seconds']['median']:,.1f} us", *share, *ratios])
    if "expected" in result:
        failed = result.get("failed", [])
        named = f": {', '.join(failed[:3])}" if failed else ""
        if "collected" in result:
            return f"{result['collected']} of {result['expected']} tests collected"
        return f"{result.get('passed', 0)} of {result['expected']} tests passed, {len(failed)} failed{named}"
    return str(result.get("error") or result.get("said") or "")[:WIDTH]


def close(output: Output, status: int) -> str:
    """Writes gpu.md and gpu.png from every line of gpu.jsonl, a stage's last one; returns the table."""
    stages = {line["stage"]: line for line in read(output.folder / "gpu.jsonl")}
    text = table(list(stages.values()), output.run, status)
    output.write("gpu.md", f"# GPU\n\n{text}\n".encode())
    try:
        subprocess.run([sys.executable, "-m", __name__, str(output.folder)], cwd=ROOT, timeout=PICTURE, capture_output=True)
    except (subprocess.TimeoutExpired, OSError) as error:  # the figures are there without it
        print(f"no picture: {error}", flush=True)
    return text


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
    return [line["result"] | {"case": f"{line['stage']}: {line['result']['case']}"} for line in lines if "contestants" in line.get("result", {})]


def table(lines: list[dict], run: str, status: int) -> str:
    """At most LINES lines and CHARACTERS characters: the machine, what became of the stages, the figures of the cases."""
    texts = []
    for line in lines:
        if "copy_gb_s" in line.get("result", {}):
            texts += [f"A copy moves {line['result']['copy_gb_s']:,.0f} GB/s. {machine(line['result'])}", ""]
            break
    passed = {}
    for line in lines:
        if line["status"] == "passed":
            passed.setdefault(line["stage"].split("-")[0], []).append(line["stage"])
    texts += [f"Passed: {', '.join(name for names in passed.values() for name in names) or 'nothing'}. Exit status {status}.", ""]
    texts += ["| stage | | s | |", "| --- | --- | --- | --- |"]
    for line in lines:
        result = line.get("result", {})
        if line["status"] == "passed" and "expected" not in result and "said" not in result:
            continue
        earlier = f" (run {line['run']})" if line.get("run") != run else ""
        said = ". ".join(filter(None, (line.get("message", "")[:120], "" if "contestants" in result else brief(result)[:200])))
        texts.append(f"| {line['stage']}{earlier} | {line['status']} | {seconds(line)} | {cell(said)} |")
    texts += ["", "| case | | us (quartiles) | ours / this | of a copy |", "| --- | --- | --- | --- | --- |"]
    for case in measured(lines):
        for i, one in enumerate(case["contestants"]):
            name = case["case"] if i == 0 else ""
            if "seconds" not in one:
                texts.append(f"| {name} | {one['name']} | missing: {cell(one['missing'][:80])} | | |")
                continue
            ratio = tables.cell(one["ours_over_this"]) if "ours_over_this" in one else ""
            share = f"{one['copy_share']:.0%}" if one["bytes"] else "-"
            texts.append(f"| {name} | {one['name']} | {tables.cell(one['seconds'], 1e6)} | {ratio} | {share} |")
            texts += [f"| | {one['name']}, {part} alone | {tables.cell(value, 1e6)} | | |" for part, value in one.get("parts", {}).items()]
    return fitted(texts)


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def fitted(texts: list[str]) -> str:
    """As many of the lines as there is room for, and how many are left out."""
    room, kept = CHARACTERS - 80, []
    for text in texts:
        room -= len(text) + 1
        if room < 0 or len(kept) == LINES - 1:
            return "\n".join([*kept, f"({len(texts) - len(kept)} lines more are in gpu.jsonl)"])
        kept.append(text)
    return "\n".join(kept)


if __name__ == "__main__":  # a process of its own: a picture that hangs or fails costs nothing else
    where = pathlib.Path(sys.argv[1])
    plot.pictures(where / "gpu.jsonl", measured(list({line["stage"]: line for line in read(where / "gpu.jsonl")}.values())))
