"""Gists: edits compressed into one token's keys and values, and the attention that selects among them (InComeS)."""
