"""Runs `python -m uegr_kernels info | demo | finetune`: what works here, and the main job."""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import signal
import sys
from collections.abc import Iterable

import torch

from . import __version__
from .core import backends, native

# a backend has this operator before any other
OPERATOR = "selective.selective_adamw_"


def info() -> str:
    """Tells versions, processor, GPUs, and for each backend where it is usable or why it is not."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy")},
    }
    lines = {
        "uegr-kernels": f"{__version__}, in {pathlib.Path(__file__).parent}",
        "versions": _list(f"{name} {version}" for name, version in versions.items()),
        "instructions": f"{native.load()[0] or 'none'} in use; the processor has "
        f"{_list(native.supported_isas())}",
        "libraries": f"built for {_list(native.built_isas())}; UEGR_KERNELS_ISA chooses another "
        "than the best",
        "threads": f"{torch.get_num_threads()} on {os.cpu_count()} processors; "
        "torch.set_num_threads changes it",
    }
    lines |= {f"GPU {i}": _gpu(i) for i in range(_gpus())} or {
        "GPU": f"none: {native.why_no_gpu()}"
    }
    lines |= {f"  {backend}": _state(backend) for backend in backends.BACKENDS}
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


def _list(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> int:
    return torch.cuda.device_count() if native.why_no_gpu() is None else 0


def _gpu(index: int) -> str:
    """Returns name and architecture of a GPU, whether the CUDA library holds code for it, and which
    backend "auto" takes there, and why.
    """
    device, found = torch.device("cuda", index), torch.cuda.get_device_properties(index)
    architecture = found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"
    code = "no CUDA library is loaded"
    if native.why_not_cuda() is None:
        held = "code" if native.holds_code((found.major, found.minor)) else "no code"
        code = f"the CUDA library holds {held} for it ({', '.join(native.architectures())})"
    taken = backends.choose("auto", OPERATOR, device, torch.float32)
    better = backends.ORDER["cuda"][: backends.ORDER["cuda"].index(taken)]
    refused = [
        f"; not {backend}: {backends.why_not(backend, OPERATOR, device, torch.float32)}"
        for backend in better
    ]
    return f"{found.name}, {architecture}; {code}; auto takes {taken}{''.join(refused)}"


def _state(backend: str) -> str:
    gpus = [f"cuda:{i}" for i in range(_gpus())]
    reasons = {
        device: backends.why_not(backend, OPERATOR, torch.device(device))
        for device in ("cpu", *(gpus or ["cuda"]))
    }
    if not gpus:
        reasons["cuda"] = reasons["cuda"] or native.why_no_gpu()
    usable = [device for device, reason in reasons.items() if reason is None]
    if usable:
        state = f"usable on {' and '.join(usable)}"
    else:
        why = reasons["cpu"] if backend == "cpp" else next(reversed(reasons.values()))
        state = f"not usable: {why}"
    if backend == "cuda" and usable:
        chosen = backends.choose("auto", OPERATOR, torch.device("cuda"), torch.float64)
        state += f"; float64 goes to {chosen}"
    return state


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status (2 for wrong arguments)."""
    parser = argparse.ArgumentParser(
        prog="python -m uegr_kernels", description="UEGR: robust fine-tuning, as PyTorch operators."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "info", help="versions, processor, GPUs, and which backends are usable or why not"
    )
    commands.add_parser(
        "demo", help="fine-tune a text classifier; `demo --help` lists the options", add_help=False
    )
    commands.add_parser(
        "finetune",
        help="a robust model of your own texts; `finetune --help` lists the options",
        add_help=False,
    )
    if arguments is None:
        arguments = sys.argv[1:]
    # their options are their own
    if arguments[:1] in (["finetune"], ["demo"]):
        try:
            from .finetune import command, demo

            if arguments[0] == "demo":
                return demo.main(arguments[1:], native.why_not)
            return command.main(arguments[1:])
        except KeyboardInterrupt:
            # before the command itself minds it
            print("\nStopped; nothing is trained yet.", file=sys.stderr)
            return 130
    chosen = parser.parse_args(arguments).command
    if chosen is None:
        parser.print_help()
        return 0
    try:
        print(info())
    except (ValueError, RuntimeError) as error:
        # a UEGR_KERNELS_ISA that cannot be served
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    # the package's own, until it was imported
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
