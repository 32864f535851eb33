"""An edited model as lm-eval's `LM`: its requests are put to `Edited.score` and `Edited.generate`.

So weights, layers that stand in for others, pools that attention reads, and text before the prompt all answer lm-eval
as they answer this project's own evaluation. Needs the extra `lm-eval`.
"""

import re
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM  # type: ignore  # the extra need not be installed where types are checked
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore

from datamodules.records import join
from datamodules.tokens import adds_bos, encode
from modules.asked import Asked
from modules.editor import Edited

NEW_TOKENS = 256  # where a task does not say how many, as lm-eval's own models
FIRST = 32  # tokens written before the first look for a stop


class EditedLM(LM):
    """What `lm_eval.simple_evaluate(model=...)` takes.

    Which tokens of `context + continuation` are scored is lm-eval's rule: all beyond those that the context has alone,
    white space at the context's end not counted to it. An editor that reads the prompt as text (retrieval, a scope, a
    codebook) is given the context as the prompt.

    Nothing is cut: what does not fit the context window beside the edits is an error (lm-eval's own models drop a
    prompt's beginning).

    Args:
        edited: good for as long as its edits are.
        batch_size: texts in one forward pass.

    Raises:
        ValueError: of `loglikelihood` and `loglikelihood_rolling`, where an editor reads prompts and there is none, or
            none that can be told apart from what is scored; of `generate_until`, for sampling; and as
            `Edited.score` and `Edited.generate` do.
    """

    def __init__(self, edited: Edited, batch_size: int = 8) -> None:
        super().__init__()
        self.edited = edited
        self.batch_size = batch_size

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding would write it) of each (context, continuation)."""
        pieces = [self._piece(*request.args[:2]) for request in requests]
        prompts, targets, counts = zip(*pieces, strict=True)
        found = []
        for score, count in zip(self.edited.score(prompts, targets, self.batch_size), counts, strict=True):
            log_probs, same = score.log_probs[-count:], (score.predicted == score.target)[-count:]
            found.append((float(log_probs.sum()), bool(same.all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each (text,), all of it after a BOS, or an end-of-text token where there is none."""
        pieces = [self._alone(request.args[0]) for request in requests]
        prompts, targets, counts = zip(*pieces, strict=True)
        scores = self.edited.score(prompts, targets, self.batch_size)
        return [float(s.log_probs[-count:].sum()) for s, count in zip(scores, counts, strict=True)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy continuations of each (context, options), cut before the first stop."""
        options: list[Any] = [normalize_gen_kwargs(request.args[1], NEW_TOKENS) for request in requests]
        if any(given["do_sample"] for given in options):
            raise ValueError("an edited model is asked greedily; set do_sample: false in the task's file")
        groups: dict[int, list[int]] = {}
        for i, given in enumerate(options):
            groups.setdefault(given["max_gen_toks"], []).append(i)
        texts: dict[int, str] = {}
        for most, some in groups.items():
            stops = [[stop for stop in options[i]["until"] if stop] for i in some]
            texts |= zip(some, self._written([requests[i].args[0] for i in some], stops, most), strict=True)
        return [texts[i] for i in range(len(requests))]

    def _written(self, contexts: Sequence[str], stops: Sequence[Sequence[str]], most: int) -> list[str]:
        """Twice as many tokens each time, so that what stops soon does not cost all that it may write."""
        texts: list[str | None] = [None] * len(contexts)
        going, limit = list(range(len(contexts))), 0
        while going and limit < most:
            limit = min(2 * limit or FIRST, most)
            new = self.edited.generate([contexts[i] for i in going], limit, self.batch_size)
            for i, text in zip(list(going), new, strict=True):
                if text == texts[i] or any(stop in text for stop in stops[i]):  # more tokens changed nothing: it ended
                    going.remove(i)
                texts[i] = text
        return [_cut(text or "", stop) for text, stop in zip(texts, stops, strict=True)]

    def _piece(self, context: str, continuation: str) -> tuple[str, str, int]:
        """Prompt and target that make up the text, and how many of the target's last tokens are scored."""
        if not context:
            return self._alone(continuation)
        tokenizer, text = self.edited.backbone.tokenizer, context + continuation
        context = _stripped(context)
        continuation = text[len(context) :]
        count = len(encode(tokenizer, text).ids) - (len(encode(tokenizer, context).ids) if context else 0)
        split = bool(context and continuation.strip()) and join(context, continuation) == text
        own = len(encode(tokenizer, context, continuation).target_ids) if split else 0
        if split and (self.edited.reads_prompts or own == count):
            return context, continuation, own
        self._needs_no_prompt(f"{continuation[:40]!r} follows its context without a space")
        # the last word goes over to the target, which then begins with white space or with the text
        head = re.sub(r"\s+\S+$", "", context) if re.search(r"\s", context) else ""
        return head, text[len(head) :], count

    def _alone(self, text: str) -> tuple[str, str, int]:
        """A text without a prompt: every token of it is scored."""
        self._needs_no_prompt("a text without a context is to be scored")
        edited, tokenizer = self.edited, self.edited.backbone.tokenizer
        begun = edited.context or (edited.bos and adds_bos(tokenizer))
        first = "" if begun else str(tokenizer.bos_token or tokenizer.eos_token or "")
        return "", first + text, len(encode(tokenizer, text, bos=False).ids)

    def _needs_no_prompt(self, what: str) -> None:
        if self.edited.reads_prompts:
            raise ValueError(f"{type(self.edited).__name__} reads the prompt as text, and {what}")


def _stripped(context: str) -> str:
    """Without white space at its end, which is the continuation's."""
    if isinstance(context, Asked) and context.text.strip():
        return Asked(context.shots, context.text.rstrip(), context.question.rstrip())
    return context.rstrip()


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
