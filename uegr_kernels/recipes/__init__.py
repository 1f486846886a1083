"""Every method of the field by a name, with one interface: `uk.recipes.NAME(model, embedding,
optimizer=None, **options)`.
"""

from .baselines import L1 as l1
from .baselines import L2 as l2
from .baselines import Plain as plain
from .bi_stage import UEGR as uegr
from .child_tuning import ChildTuningD as child_tuning_d
from .child_tuning import ChildTuningF as child_tuning_f
from .consistency import RAT as r_at
from .consistency import RATSU as r_at_su
from .consistency import RDrop as r_drop
from .consolidation import WeightConsolidation as weight_consolidation
from .free_steps import FreeAT as free_at
from .free_steps import FreeLB as free_lb
from .masked_attack import DropAttack as drop_attack
from .masked_attack import DropAttackK as drop_attack_k
from .projected_gradient import PGD as pgd
from .projected_gradient import AdvEmbed as adv_embed
from .recipe import Recipe
from .registry import NAMES, RECIPES
from .representation_regularized import ARAT as arat
from .selective_training import RoAST as roast
from .single_step import AT as at
from .single_step import FGSM as fgsm
from .weight_ascent import AWP as awp
from .weight_ascent import SAM as sam

__all__ = ["NAMES", "RECIPES", "Recipe", *NAMES]
