"""Editors that are trained: one LightningModule each."""

from modules.trained.incomes import InComeS
from modules.trained.mend import MEND

__all__ = ["MEND", "InComeS"]
