"""Checkpoints that are whole or do not count."""
