"""Protocols of single benchmarks, one a file; each is called as `modules.evaluation.evaluate` is."""
