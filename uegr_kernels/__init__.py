"""Fused selective optimizers and divergence losses for fine-tuning language models that
generalise and withstand attack (UEGR).
"""

import os
import signal
import sys
import types

if getattr(sys, "argv", [])[:1] == ["-m"] and __name__ in sys.orig_argv:
    # `python -m uegr_kernels`: torch is imported for seconds, in which Ctrl-C would end in a
    # traceback. `__main__` takes the signal back.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(
            signal.SIGINT,
            lambda *_: (os.write(2, b"\nStopped; nothing is done yet.\n"), os._exit(130)),
        )

from . import recipes
from .bistage import BiStage, BiStageResult
from .divergence import (
    LossParts,
    PairwiseJSLoss,
    UEGRLoss,
    linear_pairwise_js,
    linear_uegr_loss,
    pairwise_js,
    uegr_loss,
)
from .dropout import AdaptiveDropout, replace_dropout
from .perturbation import fgm_perturbation, perturbed_weights, pgd_step
from .selective import (
    SelectiveAdamW,
    SelectiveSGD,
    select_gradients_,
    selection_mask,
    selection_probability,
)


def __getattr__(name: str) -> types.ModuleType:
    # on demand: training needs none of it
    if name == "analysis":
        import importlib

        return importlib.import_module(".analysis", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.2.0"
__all__ = [
    "AdaptiveDropout",
    "BiStage",
    "BiStageResult",
    "LossParts",
    "PairwiseJSLoss",
    "SelectiveAdamW",
    "SelectiveSGD",
    "UEGRLoss",
    "analysis",
    "fgm_perturbation",
    "linear_pairwise_js",
    "linear_uegr_loss",
    "pairwise_js",
    "perturbed_weights",
    "pgd_step",
    "recipes",
    "replace_dropout",
    "select_gradients_",
    "selection_mask",
    "selection_probability",
    "uegr_loss",
]
