"""Every method of the field by a name, with one interface: `uk.recipes.NAME(model, embedding, optimizer=None, **options)`."""

from .at import AT as at
from .at import FGSM as fgsm
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
from .uegr import UEGR as uegr

NAMES = ("plain", "l1", "l2", "at", "fgsm", "pgd", "free_at", "free_lb", "r_drop", "r_at", "r_at_su", "uegr", "adv_embed")
__all__ = ["NAMES", *NAMES]
