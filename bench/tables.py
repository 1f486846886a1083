"""Results as Markdown."""


def cell(values: dict, scale: float = 1, digits: int = 3) -> str:
    """Median and, in brackets, the quartiles."""
    middle, low, high = (_digits(values[key] * scale, digits) for key in ("median", "q1", "q3"))
    return f"{middle} ({low}-{high})"


def _digits(value: float, digits: int) -> str:
    """With so many significant digits, and no exponent."""
    return f"{float(f'{value:.{digits}g}'):,.10f}".rstrip("0").rstrip(".")


def table(lines: list[dict]) -> str:
    """Everything, a row per contestant."""
    rows = [
        "| case | | ms a step (quartiles) | ours / this | GB/s | of a copy | peak extra MiB | "
        "launches |",
        "| --- " * 8 + "|",
    ]
    for line in lines:
        for reason in (f"{key}: {line[key]}" for key in ("error", "skipped") if key in line):
            rows.append(f"| {line['case']} | {reason} | | | | | | |")
        for i, one in enumerate(line.get("contestants", [])):
            name = "" if i else case_name(line)
            if "missing" in one:
                rows.append(f"| {name} | {one['name']} | missing: {one['missing']} | | | | | |")
                continue
            ratio = cell(one["ours_over_this"]) if "ours_over_this" in one else ""
            rate = f"{one['gb_s']:.3g} | {one['copy_share']:.0%}" if one["bytes"] else "- | -"
            times = cell(one["seconds"], 1000)
            rows.append(
                f"| {name} | {one['name']} | {times} | {ratio} | {rate} | {extra(one)} | "
                f"{one.get('launches', '-')} |"
            )
        if "breakdown" in line:
            rows.append(f"| | where ours spends its time: {breakdown(line)} | | | | | | |")
    return "\n".join(rows)


def disturbed(line: dict) -> bool:
    """Whether other programs took a fifth of a processor or more from the case."""
    return (line.get("others_cpus") or 0) >= 0.2


def case_name(line: dict) -> str:
    return line["case"] + " [disturbed]" * disturbed(line)


def extra(one: dict) -> str:
    return "-" if one["peak_extra_bytes"] is None else f"{one['peak_extra_bytes'] / 2**20:.1f}"


def breakdown(line: dict) -> str:
    return ", ".join(f"{part} {share:.1%}" for part, share in line["breakdown"].items())


def summary(lines: list[dict], peers: tuple[str, ...] = ()) -> str:
    """A row per case: ours, and its time over each of the peers' that were timed; all of them
    where none are named.
    """
    lines = [line for line in lines if "contestants" in line]
    timed = dict.fromkeys(
        one["name"] for line in lines for one in line["contestants"][1:] if "ours_over_this" in one
    )
    peers = tuple(peer for peer in peers or timed if peer in timed)
    rows = [
        f"| case | ms a step | {' | '.join(f'ours / {peer}' for peer in peers)} | of a copy | peak "
        "extra MiB |",
        "| --- " * (len(peers) + 4) + "|",
    ]
    for line in lines:
        ours, *others = line["contestants"]
        ratios = {
            one["name"]: cell(one["ours_over_this"], digits=2)
            for one in others
            if "ours_over_this" in one
        }
        cells = " | ".join(ratios.get(peer, "-") for peer in peers)
        share = f"{ours['copy_share']:.0%}" if ours["bytes"] else "-"
        rows.append(
            f"| {case_name(line)} | {cell(ours['seconds'], 1000)} | {cells} | {share} | "
            f"{extra(ours)} |"
        )
    return "\n".join(rows)


def missing(lines: list[dict]) -> str:
    """The peers that ran in no case, and why not in the first of them; the cases that were
    skipped or wrong.
    """
    everyone = [one for line in lines for one in line.get("contestants", [])]
    ran = {one["name"] for one in everyone if "missing" not in one}
    reasons: dict[str, str] = {}
    for one in everyone:
        if one["name"] not in ran:
            reasons.setdefault(one["name"], one["missing"])
    texts = [f"{name} ({reason})" for name, reason in reasons.items()]
    texts += [
        f"{line['case']} ({line[key]})"
        for line in lines
        for key in ("skipped", "error")
        if key in line
    ]
    return f"Missing: {', '.join(texts)}." if texts else ""


def origins(lines: list[dict]) -> str:
    """For each run: the command, the machine, the versions, and how quiet it was."""
    runs: dict[tuple, list[dict]] = {}
    for line in lines:
        runs.setdefault((line["command"], line["time"]), []).append(line)
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
        measured = [line for line in found if "copy_gb_s" in line]
        if measured:
            text += (
                f"; a copy moves {measured[0]['copy_gb_s']['median']:.3g} GB/s; load average "
                f"before {measured[0]['load_before'][0]:.2f}"
            )
        busiest = max(
            (line["others_cpus"] for line in measured if line["others_cpus"] is not None),
            default=None,
        )
        text += "" if busiest is None else f"; other programs used up to {busiest:.2f} processors"
        texts.append(text + (f". WARNING: {first['warning']}." if first["warning"] else "."))
    return "\n\n".join(texts)
