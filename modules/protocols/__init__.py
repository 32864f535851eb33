"""Protocols of single benchmarks, one a file; each is a `modules.judging.Judge`."""
