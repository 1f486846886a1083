"""Tells results as Markdown."""

from collections.abc import Iterable


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table of these cells; a row may be short."""
    heads = list(heads)
    lines = ["|" + "".join(f" {head} |" if head else " |" for head in heads)]
    lines.append("| --- " * len(heads) + "|")
    for row in map(list, rows):
        lines.append(f"| {' | '.join(row)} |" + " |" * (len(heads) - len(row)))
    return "\n".join(lines)


def cell(values: dict, scale: float = 1, digits: int = 3) -> str:
    """Returns the median and, in brackets, the quartiles."""
    middle, low, high = (_digits(values[key] * scale, digits) for key in ("median", "q1", "q3"))
    return f"{middle} ({low}-{high})"


def _digits(value: float, digits: int) -> str:
    """Writes with so many significant digits, and no exponent."""
    return f"{float(f'{value:.{digits}g}'):,.10f}".rstrip("0").rstrip(".")


def results(records: list[dict]) -> str:
    """Returns everything, a row per contestant."""
    heads = ["case", "", "ms a step (quartiles)", "ours / this", "GB/s", "of a copy"]
    heads += ["peak extra MiB", "launches"]
    rows = []
    for record in records:
        for key in ("error", "skipped"):
            if key in record:
                rows.append([record["case"], f"{key}: {record[key]}"])
        for i, one in enumerate(record.get("contestants", [])):
            name = "" if i else record["case"]
            if "missing" in one:
                rows.append([name, one["name"], f"missing: {one['missing']}"])
                continue
            ratio = cell(one["ours_over_this"]) if "ours_over_this" in one else ""
            stated = one["bytes"]
            rates = [f"{one['gb_s']:.3g}", f"{one['copy_share']:.0%}"] if stated else ["-", "-"]
            times = cell(one["seconds"], 1000)
            launches = str(one.get("launches", "-"))
            rows.append([name, one["name"], times, ratio, *rates, extra(one), launches])
        if "breakdown" in record:
            rows.append(["", f"where ours spends its time: {breakdown(record)}"])
    return table(heads, rows)


def extra(one: dict) -> str:
    """Returns the peak extra memory in MiB."""
    return "-" if one["peak_extra_bytes"] is None else f"{one['peak_extra_bytes'] / 2**20:.1f}"


def breakdown(record: dict) -> str:
    """Tells the shares of the parts of ours."""
    return ", ".join(f"{part} {share:.1%}" for part, share in record["breakdown"].items())


def summary(records: list[dict], peers: tuple[str, ...] = ()) -> str:
    """Returns a row per case: ours, and its time over each of the peers' that were timed; all of
    them where none are named.
    """
    measured = [record for record in records if "contestants" in record]
    timed = dict.fromkeys(
        one["name"]
        for record in measured
        for one in record["contestants"][1:]
        if "ours_over_this" in one
    )
    peers = tuple(peer for peer in peers or timed if peer in timed)
    heads = ["case", "ms a step", *(f"ours / {peer}" for peer in peers)]
    rows = []
    for record in measured:
        ours, *others = record["contestants"]
        ratios = {
            one["name"]: cell(one["ours_over_this"], digits=2)
            for one in others
            if "ours_over_this" in one
        }
        share = f"{ours['copy_share']:.0%}" if ours["bytes"] else "-"
        times = [cell(ours["seconds"], 1000), *(ratios.get(peer, "-") for peer in peers)]
        rows.append([record["case"], *times, share, extra(ours)])
    return table([*heads, "of a copy", "peak extra MiB"], rows)


def missing(records: list[dict]) -> str:
    """Names the peers that ran in no case, and why not in the first of them; the cases that were
    skipped or wrong.
    """
    everyone = [one for record in records for one in record.get("contestants", [])]
    ran = {one["name"] for one in everyone if "missing" not in one}
    reasons: dict[str, str] = {}
    for one in everyone:
        if one["name"] not in ran:
            reasons.setdefault(one["name"], one["missing"])
    texts = [f"{name} ({reason})" for name, reason in reasons.items()]
    texts += [
        f"{record['case']} ({record[key]})"
        for record in records
        for key in ("skipped", "error")
        if key in record
    ]
    return f"Missing: {', '.join(texts)}." if texts else ""


def origins(records: list[dict]) -> str:
    """Tells of each run: the command, the machine, the versions, and how quiet it was."""
    runs: dict[tuple, list[dict]] = {}
    for record in records:
        runs.setdefault((record["command"], record["time"]), []).append(record)
    texts = []
    for (command, when), found in runs.items():
        first = found[0]
        machine, versions = first["machine"], first["versions"]
        text = (
            f"`{command}`, {when[:10]}: "
            f"{machine.get('gpu', '')}{' and ' * ('gpu' in machine)}{machine['cpu']}, "
        )
        text += f"{machine['threads']} threads on {machine['cpus']} processors, {machine['isa']}; "
        text += (
            f"torch {versions['torch']}, uegr_kernels {versions['uegr_kernels']} at "
            f"{first['commit']}"
        )
        measured = [record for record in found if "copy_gb_s" in record]
        if measured:
            text += (
                f"; a copy moves {measured[0]['copy_gb_s']['median']:.3g} GB/s; load average "
                f"before {measured[0]['load_before'][0]:.2f}"
            )
        busiest = max(
            (record["others_cpus"] for record in measured if record["others_cpus"] is not None),
            default=None,
        )
        if busiest is not None:
            # clocks read in ticks may say a little less than none
            text += f"; other programs used up to {max(busiest, 0.0):.2f} processors"
        texts.append(f"{text}.")
    return "\n\n".join(texts)
