"""Fine-tunes a classifier on texts of one's own, as a function and as a command."""

from .data import UserError
from .task import finetune

__all__ = ["UserError", "finetune"]
