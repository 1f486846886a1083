"""Models on paper the selective step in sharded training: arithmetic on constants that are
arguments, nothing measured.
"""

import argparse
import math
from dataclasses import dataclass, fields

from . import tables

# bytes AdamW moves for one element in float32: parameter 4 + 4, gradient 4, two moments 8 + 8
ELEMENT = 28
# of the gradient, where min-max is taken over this step's
SECOND_READ = 4
# bytes an element lies in: parameter, gradient, two moments
STATE = 16
# bytes of one tensor's minimum and maximum in a collective
STATISTICS = 8


@dataclass(frozen=True)
class Training:
    """Holds every constant, with where its default comes from; a data sheet's number is a limit,
    not a measurement.
    """

    # the question
    parameters: float = 1e11
    # assumed
    gpus: float = 1024
    # assumed: about 100 layers of ten
    tensors: float = 1000
    # in a step: assumed, the order of what models of this size are trained with
    tokens: float = 4e6
    # m, the method's default
    passes: float = 2
    # bytes per second and GPU: data sheet of the H100 SXM5
    memory_bandwidth: float = 3.35e12
    # bytes per second and GPU: a port of 400 Gb/s
    network_bandwidth: float = 5e10
    # seconds for one message between two GPUs: assumed
    latency: float = 1e-5
    # operations per second and GPU: data sheet of the H100 SXM5, bfloat16 without sparsity
    peak: float = 9.89e14
    # of that peak: assumed
    utilization: float = 0.4


def step_bytes(given: Training, bytes_an_element: int) -> float:
    """Returns the bytes that each GPU moves in one step of the optimizer."""
    return bytes_an_element * given.parameters / given.gpus


def collective_seconds(given: Training) -> float:
    """Returns the time of an all-reduce of every tensor's minimum and maximum along a tree: up and
    down it in messages, all bytes over a GPU's port twice.
    """
    hops = 2 * math.ceil(math.log2(given.gpus))
    return hops * given.latency + 2 * STATISTICS * given.tensors / given.network_bandwidth


def passes_seconds(given: Training, passes: float) -> float:
    """Returns the time of forward and backward: 6 operations per parameter and token, as often as
    the batch passes through the model.
    """
    return (
        passes * 6 * given.parameters * given.tokens / (given.gpus * given.peak * given.utilization)
    )


def comparison(given: Training) -> str:
    """Returns the model's quantities for AdamW and for the selective step with either kind of
    statistics.
    """
    # bytes an element, collectives, passes
    kinds = {
        "AdamW": (ELEMENT, 0, 1),
        'UEGR, `statistics="current"`': (ELEMENT + SECOND_READ, 1, 1 + given.passes),
        # behind the update, which waits for none
        'UEGR, `statistics="previous"`': (ELEMENT, 1, 1 + given.passes),
    }
    rows: dict[str, list[str]] = {}
    for size, collectives, passes in kinds.values():
        moved = step_bytes(given, size)
        update, joining = moved / given.memory_bandwidth, collectives * collective_seconds(given)
        whole = passes_seconds(given, passes) + update + joining
        for name, text in {
            "parameter, gradient, moments, GB a "
            "GPU": f"{STATE * given.parameters / given.gpus / 1e9:.3g}",
            "bytes an element of the step": f"{size}",
            "bytes of the step, GB a GPU": f"{moved / 1e9:.3g}",
            "its time at the memory's bandwidth, ms": f"{1e3 * update:.3g}",
            "collectives a step": f"{collectives}",
            "bytes of each": f"{STATISTICS * given.tensors:,.0f}" if collectives else "-",
            "time of all of them, ms": f"{1e3 * joining:.3g}",
            "forward and backward passes, s": f"{passes_seconds(given, passes):.3g}",
            "the optimizer's share of a training step": f"{100 * (update + joining) / whole:.2g} %",
        }.items():
            rows.setdefault(name, []).append(text)
    return tables.table(["", *kinds], ([name, *cells] for name, cells in rows.items()))


def default_comparison() -> str:
    """Returns the comparison at the defaults."""
    return comparison(Training())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for field in fields(Training):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_positive,
            default=field.default,
            metavar="X",
            help=f"{field.default:g}",
        )


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def from_arguments(options: argparse.Namespace) -> Training:
    return Training(**{field.name: getattr(options, field.name) for field in fields(Training)})
