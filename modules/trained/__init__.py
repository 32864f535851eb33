"""Editors that are trained: one LightningModule each."""

from modules.trained.distillmike import DistillMIKE
from modules.trained.ibke import IBKE
from modules.trained.incomes import InComeS
from modules.trained.mend import MEND
from modules.trained.serac import SERAC

__all__ = ["IBKE", "MEND", "SERAC", "DistillMIKE", "InComeS"]
