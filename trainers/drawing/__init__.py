"""Figures, a subject a file: values in, a matplotlib Figure out; nothing here knows of a run."""
