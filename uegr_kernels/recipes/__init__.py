"""Every method of the field by a name, with one interface: `uk.recipes.NAME(model, embedding, optimizer=None, **options)`."""

from .arat import ARAT as arat
from .at import AT as at
from .at import FGSM as fgsm
from .child_tuning import ChildTuningD as child_tuning_d
from .child_tuning import ChildTuningF as child_tuning_f
from .drop_attack import DropAttack as drop_attack
from .drop_attack import DropAttackK as drop_attack_k
from .free import FreeAT as free_at
from .free import FreeLB as free_lb
from .pgd import PGD as pgd
from .pgd import AdvEmbed as adv_embed
from .plain import L1 as l1
from .plain import L2 as l2
from .plain import Plain as plain
from .r_drop import RAT as r_at
from .r_drop import RATSU as r_at_su
from .r_drop import RDrop as r_drop
from .roast import RoAST as roast
from .uegr import UEGR as uegr
from .weight_consolidation import WeightConsolidation as weight_consolidation
from .weights import AWP as awp
from .weights import SAM as sam

NAMES = (
    *("plain", "l1", "l2", "at", "fgsm", "pgd", "free_at", "free_lb", "r_drop", "r_at", "r_at_su", "uegr"),
    *("drop_attack", "drop_attack_k", "child_tuning_f", "child_tuning_d", "roast", "adv_embed", "sam", "awp"),
    *("weight_consolidation", "arat"),
)
__all__ = ["NAMES", *NAMES]
