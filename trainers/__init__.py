"""What a user runs, and what wires a run together."""
