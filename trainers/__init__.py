"""What a user runs, and what wires a run together."""

import os

# no file that any library loads with torch here may bring code along: DeepSpeed, for one, would let it
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
