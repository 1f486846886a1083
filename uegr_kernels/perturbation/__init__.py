"""Adversarial perturbations of embeddings and of weights (Eq. 2; PGD; DropAttack's random
masks).
"""

from .api import fgm_perturbation, masked, perturbed_weights, pgd_step

__all__ = ["fgm_perturbation", "masked", "perturbed_weights", "pgd_step"]
