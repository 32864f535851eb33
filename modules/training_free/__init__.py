"""Editors that need no training."""
