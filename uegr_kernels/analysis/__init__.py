"""Looks at a model or a run: what was selected, and what came of it. Imported on demand, as
`uk.analysis`.
"""

from . import pictures
from .attack import Attacked, accuracy_under_attack, plot_accuracy_under_attack
from .calibration import (
    calibration_error,
    expected_calibration_error,
    ood_auroc,
    plot_calibration,
    plot_ood_auroc,
)
from .cka import cka, linear_cka, plot_cka
from .conflict import Conflict, gradient_conflict, plot_gradient_conflict
from .corruption import corrupted
from .landscape import LossPlane, loss_plane, plot_loss_plane, random_directions
from .posterior import plot_sgd_covariance, plot_sgd_diagnostic, sgd_covariance, sgd_diagnostic
from .selection import (
    ParameterSelection,
    SelectionReport,
    plot_selection_report,
    selection_report,
    share_selected,
)
from .sharpness import hessian_trace, largest_eigenvalue

__all__ = [
    "Attacked",
    "Conflict",
    "LossPlane",
    "ParameterSelection",
    "SelectionReport",
    "accuracy_under_attack",
    "calibration_error",
    "cka",
    "corrupted",
    "expected_calibration_error",
    "gradient_conflict",
    "hessian_trace",
    "largest_eigenvalue",
    "linear_cka",
    "loss_plane",
    "ood_auroc",
    "pictures",
    "plot_accuracy_under_attack",
    "plot_calibration",
    "plot_cka",
    "plot_gradient_conflict",
    "plot_loss_plane",
    "plot_ood_auroc",
    "plot_selection_report",
    "plot_sgd_covariance",
    "plot_sgd_diagnostic",
    "random_directions",
    "selection_report",
    "sgd_covariance",
    "sgd_diagnostic",
    "share_selected",
]
