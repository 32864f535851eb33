"""The kinds of modules that the dry run knows, one a file."""

import lightning as L

from trainers.estimate.families.base import MODEL, Family
from trainers.estimate.families.distill import Distillation
from trainers.estimate.families.hypernetwork import Hypernetworks
from trainers.estimate.families.incomes import Gists
from trainers.estimate.families.serac import Classified

__all__ = ["MODEL", "Family", "family_of"]

_KNOWN: tuple[Family, ...] = (Gists(), Hypernetworks(), Classified(), Distillation())


def family_of(module: L.LightningModule) -> Family:
    """What is known of modules like this one.

    Raises:
        ValueError: for a kind that is not known.
    """
    for family in _KNOWN:
        if isinstance(module, family.kind):
            return family
    kinds = ", ".join(family.kind.__name__ for family in _KNOWN)
    raise ValueError(f"the dry run knows modules of the kinds {kinds}, not {type(module).__name__} (model.class_path)")
