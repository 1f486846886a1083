"""Every method of the field by a name, with one interface: `uk.recipes.NAME(model, embedding, optimizer=None, **options)`."""

from .at import AT as at
from .at import FGSM as fgsm
from .plain import L1 as l1
from .plain import L2 as l2
from .plain import Plain as plain
from .uegr import UEGR as uegr

NAMES = ("plain", "l1", "l2", "at", "fgsm", "uegr")
__all__ = ["NAMES", *NAMES]
