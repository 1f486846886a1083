"""Adversarial perturbations of embeddings and of weights (Eq. 2; PGD; DropAttack's random
masks).
"""

from .api import ASCENT_NORMS, NORMS, PERS, fgm_perturbation, masked, perturbed_weights, pgd_step

__all__ = [
    "ASCENT_NORMS",
    "NORMS",
    "PERS",
    "fgm_perturbation",
    "masked",
    "perturbed_weights",
    "pgd_step",
]
