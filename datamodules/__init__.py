"""Records, readers and batches: where the facts come from and how they reach an editor."""
