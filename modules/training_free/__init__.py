"""Editors that need no training."""

from modules.training_free.alphaedit import AlphaEdit as AlphaEdit
from modules.training_free.coachhook import CoachHook as CoachHook
from modules.training_free.emmet import EMMET as EMMET
from modules.training_free.memit import MEMIT as MEMIT
from modules.training_free.memit import PMET as PMET
from modules.training_free.rome import ROME as ROME
from modules.training_free.rome import RROME as RROME
