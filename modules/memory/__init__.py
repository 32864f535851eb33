"""Edits kept outside the weights, to be looked up for each query."""

from modules.memory.edit_memory import EditMemory
from modules.memory.encoder import Encoder, EncoderConfig, SentenceEncoder
from modules.memory.retrieval import Retrieved, retrieve

__all__ = ["EditMemory", "Encoder", "EncoderConfig", "Retrieved", "SentenceEncoder", "retrieve"]
