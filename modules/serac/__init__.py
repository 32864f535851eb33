"""SERAC's parts: a scope classifier over a memory of edits, and a small model that answers in scope."""
