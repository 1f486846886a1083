"""Compiles Triton's kernels for the whole product of the options, which takes hours:

    python python_tests/compile_all.py FILE

writes a line of FILE for each function, dtype, target and version of Triton (launches.py says which
calls there are); what stands in FILE already is not done again.
"""

import itertools
import json
import pathlib
import sys

import launches

sys.path.append(str(pathlib.Path(__file__).parent.parent))
from bench import triton_code


def compile_all(path: pathlib.Path) -> None:
    """Compiles the whole product: a line of the file for each version, target, function and dtype;
    those that it has are not done again.
    """
    for reason in map(triton_code.why_not, triton_code.VERSIONS):
        if reason is not None:
            sys.exit(reason)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {
        tuple(line[key] for key in ("version", "target", "function", "dtype")) for line in known
    }
    functions = [(family, name) for family, names in launches.FAMILIES.items() for name in names]
    for (family, name), dtype, version, target in itertools.product(
        functions, launches.DTYPES, triton_code.VERSIONS, triton_code.TARGETS
    ):
        if (version, target, name, dtype) in done:
            continue
        calls = launches.product(family, name, dtype)
        found = triton_code.compiled(calls, target, version)
        assert len(found) == len(calls)
        every = {tuple(kernel[:5]) for line in found for kernel in line.get("kernels", ())}
        line = {
            "version": version,
            "target": target,
            "function": name,
            "dtype": dtype,
            "calls": len(calls),
            "kernels": len(every),
        }
        line |= {
            "most_registers": max(kernel[2] for kernel in every),
            "most_spilled": max(kernel[3] for kernel in every),
        }
        above = [
            one["statement"]
            for one in found
            if any(kernel[3] > triton_code.MOST_SPILLED for kernel in one.get("kernels", ()))
        ]
        line |= {"spilling": len(above), "first_spilling": above[:1]}
        line |= {
            "errors": [[one["statement"], one["error"][:500]] for one in found if "error" in one][
                :3
            ]
        }
        with path.open("a") as file:
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    compile_all(pathlib.Path(sys.argv[1]))
