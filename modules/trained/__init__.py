"""Editors that are trained: one LightningModule each."""
