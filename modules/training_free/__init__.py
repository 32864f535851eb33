"""Editors that need no training."""

from modules.training_free.alphaedit import AlphaEdit as AlphaEdit
from modules.training_free.coachhook import CoachHook as CoachHook
from modules.training_free.emmet import EMMET as EMMET
from modules.training_free.ft import FTEAC as FTEAC
from modules.training_free.ft import FTL as FTL
from modules.training_free.ft import FTM as FTM
from modules.training_free.grace import GRACE as GRACE
from modules.training_free.ike import IKE as IKE
from modules.training_free.kn import KN as KN
from modules.training_free.lora import LoRA as LoRA
from modules.training_free.mello import MeLLo as MeLLo
from modules.training_free.memit import MEMIT as MEMIT
from modules.training_free.memit import PMET as PMET
from modules.training_free.mike import MIKE as MIKE
from modules.training_free.rag import RAG as RAG
from modules.training_free.rome import ROME as ROME
from modules.training_free.rome import RROME as RROME
from modules.training_free.t_patcher import TPatcher as TPatcher
