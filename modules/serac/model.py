"""The three models of SERAC: the frozen one that is edited, the small one that answers in scope, the classifier."""

from typing import Self

from torch import nn
from transformers import PreTrainedTokenizerBase

from modules.backbone import Backbone
from modules.serac.scope import ScopeClassifier

_PROBE = "Zürich's 1,024 lakes\n\tlie in (un)known places."


class SeracModel(nn.Module):
    """A scope classifier and a counterfactual model, both trained, beside the base model, which is frozen and no part
    of this module: it is neither trained nor saved with it, and is not cast to the precision of the training.

    It has no dropout, as published: it is never in training mode.

    Raises:
        ValueError: where the two language models do not share a vocabulary.
    """

    def __init__(self, backbone: Backbone, counterfactual: Backbone, scope: ScopeClassifier) -> None:
        check_vocabulary(backbone, counterfactual)
        super().__init__()
        self.backbone = backbone
        self.counterfactual = counterfactual
        self.language_model: nn.Module = counterfactual.model  # type: ignore[assignment]
        self.scope = scope
        self.requires_grad_(True)
        self.eval()

    @property
    def reader(self) -> Backbone:
        """The model that answers out of scope."""
        return self.backbone

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def check_vocabulary(backbone: Backbone, counterfactual: Backbone) -> None:
    """Refuse two models whose tokens differ (see `same_tokens`)."""
    same_tokens(backbone.tokenizer, backbone.config.source, counterfactual.tokenizer, counterfactual.config.source)


def same_tokens(one: PreTrainedTokenizerBase, name: str, other: PreTrainedTokenizerBase, other_name: str) -> None:
    """Nothing, where two tokenizers have the same tokens under the same ids, and cut texts alike.

    Raises:
        ValueError: where they do not; it names both sources and a token that differs.
    """
    left, right = one.get_vocab(), other.get_vocab()
    differ = sorted(token for token, _ in left.items() ^ right.items())
    reason = f"{len(left):,} and {len(right):,} tokens; {differ[0]!r} is not the same in both" if differ else ""
    if not reason and one(_PROBE)["input_ids"] != other(_PROBE)["input_ids"]:
        reason = "the same tokens, but they cut texts differently"
    if reason:
        raise ValueError(
            f"the counterfactual model {other_name!r} does not share the vocabulary of the base model {name!r} "
            f"({reason}): SERAC mixes and compares their tokens. Set model.counterfactual.source to a smaller model of "
            "the same family"
        )
