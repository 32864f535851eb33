"""Editors that are trained: one LightningModule each."""

from modules.trained.incomes import InComeS

__all__ = ["InComeS"]
