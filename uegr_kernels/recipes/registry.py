"""The recipes by name, in the order of the papers' tables.

A recipe is a class whose attributes say what is to know of the method without building it
(`Recipe.steps_itself`, `Recipe.selects_update`, ...), and a line here and in `__init__`.
"""

from .baselines import L1, L2, Plain
from .bi_stage import UEGR
from .child_tuning import ChildTuningD, ChildTuningF
from .consistency import RAT, RATSU, RDrop
from .consolidation import WeightConsolidation
from .free_steps import FreeAT, FreeLB
from .masked_attack import DropAttack, DropAttackK
from .projected_gradient import PGD, AdvEmbed
from .recipe import Recipe
from .representation_regularized import ARAT
from .selective_training import RoAST
from .single_step import AT, FGSM
from .weight_ascent import AWP, SAM

RECIPES: dict[str, type[Recipe]] = {
    "plain": Plain,
    "l1": L1,
    "l2": L2,
    "at": AT,
    "fgsm": FGSM,
    "pgd": PGD,
    "free_at": FreeAT,
    "free_lb": FreeLB,
    "r_drop": RDrop,
    "r_at": RAT,
    "r_at_su": RATSU,
    "uegr": UEGR,
    "drop_attack": DropAttack,
    "drop_attack_k": DropAttackK,
    "child_tuning_f": ChildTuningF,
    "child_tuning_d": ChildTuningD,
    "roast": RoAST,
    "adv_embed": AdvEmbed,
    "sam": SAM,
    "awp": AWP,
    "weight_consolidation": WeightConsolidation,
    "arat": ARAT,
}
NAMES = tuple(RECIPES)
