"""Records, readers and batches: where the facts come from and how they reach an editor."""

from datamodules.edits import EditDataModule

__all__ = ["EditDataModule"]
