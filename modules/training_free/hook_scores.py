"""Z-scores of COMEBA-HK's hook layers on the texts of a record: do edited facts stand out, and others not?

Paper: "Consecutive Batch Model Editing with HooK Layers" (Li et al. 2024), section 4.4 and figure 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from datamodules.records import EditRecord
from datamodules.tokens import encode, pad, pad_id
from modules.training_free.coachhook import HookedEdited
from modules.training_free.hook_layer import gated
from modules.training_free.subject import row

Kind = Literal["reliability", "generality", "locality"]


@dataclass(frozen=True)
class Text:
    """A text to be scored.

    Args:
        ids: its tokens.
        at: the token whose score is wanted; None: the highest of all tokens.
    """

    kind: Kind
    ids: tuple[int, ...]
    at: int | None


@dataclass(frozen=True)
class Scored:
    """What one hook layer said of one text.

    Args:
        score: of the updated key, the subject's last token; for locality the highest of the text. A text of a single
            token has none.
        open: whether the layer replaced the output at the subject's last token; for locality at any token.
    """

    kind: Kind
    layer: str
    score: float | None
    open: bool


def texts_of(edited: HookedEdited, records: Sequence[EditRecord]) -> list[Text]:
    """Prompts of the edits and rephrases that name the subject, scored there; locality queries, scored anywhere."""
    found: list[Text] = []
    for record in records:
        for request in record.requests:
            own = row(edited.backbone, request.prompt, str(request.subject))
            found.append(Text("reliability", own.ids, own.subject))
            for query in record.rephrases:
                if str(request.subject) in query.prompt:
                    other = row(edited.backbone, query.prompt, str(request.subject))
                    found.append(Text("generality", other.ids, other.subject))
        for queries in record.locality.values():
            rows = (encode(edited.backbone.tokenizer, query.prompt) for query in queries if query.prompt)
            found += [Text("locality", tuple(r.ids), None) for r in rows]
    return found


@torch.no_grad()
def hook_scores(edited: HookedEdited, texts: Sequence[Text], batch_size: int = 32) -> list[Scored]:
    """Every hook layer's view of every text, as the edited model reads it: lower hook layers have answered by then."""
    backbone = edited.backbone
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    found: list[Scored] = []
    for start in range(0, len(order), batch_size):
        batch = [texts[i] for i in order[start : start + batch_size]]
        ids, mask = (t.to(backbone.device) for t in pad([t.ids for t in batch], pad_id(backbone.tokenizer)))
        gates = edited.gates()
        with gated(backbone, gates):
            backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for name, gate in gates.items():
            for i, text in enumerate(batch):
                scores, opened = gate.scores[i], gate.open[i]  # [T]
                score = scores.max() if text.at is None else scores[text.at]
                opens = opened.any() if text.at is None else opened[text.at]
                value = float(score) if score.isfinite() else None
                found.append(Scored(text.kind, name, value, bool(opens)))
    return found
