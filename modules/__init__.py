"""Backbones, editors, losses and metrics: what is trained and what edits. No files are read here but model weights."""
