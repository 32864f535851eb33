"""What a user runs, and what wires a run together."""

import logging
import os
import warnings

# no file that any library loads with torch here may bring code along: DeepSpeed, for one, would let it
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

# what libraries have to tell each other, and advertisements, would hide what a run has to tell
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning's use of torch
warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.* is deprecated")  # DeepSpeed's
warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.* is deprecated")  # ours, until transformers 6
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡 Tip" not in record.getMessage())
