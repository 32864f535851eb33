"""A grid of editors, data sets, modes and numbers of edits, run cell by cell (`python -m trainers.evaluate --config
benchmark_smollm2.yaml`)."""
