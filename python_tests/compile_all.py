"""Compiles Triton's kernels for the whole product of the options, which takes a day on two cores:

    python python_tests/compile_all.py FILE

writes a line of FILE for each function, dtype, target and version of Triton (launches.py says which
calls there are), the functions of few calls first; what stands in FILE already is not done again.
"""

import concurrent.futures
import itertools
import json
import pathlib
import sys
from typing import Any

import launches

sys.path.append(str(pathlib.Path(__file__).parent.parent))
from bench import harness, triton_code

KEYS = ("version", "target", "function", "dtype")


def compile_all(path: pathlib.Path) -> None:
    """Compiles the whole product, two lines of the file at a time; those that it has are not done
    again.
    """
    for reason in map(triton_code.why_not, triton_code.VERSIONS):
        if reason is not None:
            sys.exit(reason)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(line[key] for key in KEYS) for line in known}
    calls = {
        (name, dtype): launches.product(family, name, dtype)
        for family, names in launches.FAMILIES.items()
        for name, dtype in itertools.product(names, launches.DTYPES)
    }
    lacking = [
        (version, target, name, dtype)
        for name, dtype in sorted(calls, key=lambda key: len(calls[key]))
        for version, target in itertools.product(triton_code.VERSIONS, triton_code.TARGETS)
        if (version, target, name, dtype) not in done
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(compiled, *one, calls[one[2:]]) for one in lacking]
        try:
            for line in concurrent.futures.as_completed(running):
                with path.open("a") as file:
                    print(json.dumps(line.result()), file=file, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def compiled(
    version: str, target: str, name: str, dtype: str, calls: tuple[str, ...]
) -> dict[str, Any]:
    """Compiles a function's calls in one dtype for one target with one version of Triton, and
    returns the line of the file.
    """
    commit = harness.commit()
    found = triton_code.compiled(calls, target, version)
    assert len(found) == len(calls)
    every = {tuple(kernel[:5]) for line in found for kernel in line.get("kernels", ())}
    spilling = [
        one["statement"]
        for one in found
        if any(kernel[3] > triton_code.MOST_SPILLED for kernel in one.get("kernels", ()))
    ]
    errors = [[one["statement"], one["error"][:500]] for one in found if "error" in one]
    return dict(zip(KEYS, (version, target, name, dtype), strict=True)) | {
        "commit": commit,
        "calls": len(calls),
        "kernels": len(every),
        "most_registers": max((kernel[2] for kernel in every), default=None),
        "most_spilled": max((kernel[3] for kernel in every), default=None),
        "spilling": len(spilling),
        "first_spilling": spilling[:1],
        "errors": errors[:3],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    compile_all(pathlib.Path(sys.argv[1]))
