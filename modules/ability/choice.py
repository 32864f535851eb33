"""Tasks that are a choice between given answers: the most probable one counts."""

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.tokens import encode
from modules.ability.task import Answer, Example, Task
from modules.editor import Edited

AT_ONCE = 64  # prompts of which a rank is held for every token of the vocabulary


@dataclass
class Choice(Task):
    """A task whose examples have options.

    Args:
        path: its file or folder.
    """

    path: str

    @property
    def protocols(self) -> dict[str, str]:
        what = "Share of questions whose right answer is the option with the highest probability."
        return {f"{self.name}/accuracy": what}

    def answers(self, edited: Edited, examples: Sequence[Example], batch_size: int) -> list[Answer]:
        chosen = choose(edited, [e.prompt for e in examples], [e.options for e in examples], batch_size)
        return [{"choice": e.options[i]} for e, i in zip(examples, chosen, strict=True)]

    def judge(self, example: Example, answer: Answer) -> dict[str, float]:
        return {f"{self.name}/accuracy": float(answer["choice"] in example.answers)}


@dataclass
class TwoWay(Choice):
    """A choice that EAC's released code judges otherwise.

    Args:
        released: also write one token, and look for an option in it, as that code does. Of its two accuracies one
            leaves out the questions after which the model writes neither.
    """

    released: bool = False

    @property
    def protocols(self) -> dict[str, str]:
        by_token = {
            f"{self.name}/generated_accuracy": "Share of questions after which the one greedy token holds the right "
            "option, in any case; a token that holds none is wrong.",
            f"{self.name}/generated_accuracy_decided": "The same over the questions whose token holds an option: of a "
            "model that seldom answers it says little.",
        }
        return super().protocols | (by_token if self.released else {})

    def answers(self, edited: Edited, examples: Sequence[Example], batch_size: int) -> list[Answer]:
        found = super().answers(edited, examples, batch_size)
        if not self.released:
            return found
        texts = edited.generate([e.prompt for e in examples], max_new_tokens=1, batch_size=batch_size)
        return [{**answer, "text": text} for answer, text in zip(found, texts, strict=True)]

    def judge(self, example: Example, answer: Answer) -> dict[str, float]:
        values = super().judge(example, answer)
        if self.released:
            text = answer["text"].casefold()
            said = next((option for option in example.options if option.casefold() in text), None)
            values[f"{self.name}/generated_accuracy"] = float(said in example.answers)
            if said is not None:
                values[f"{self.name}/generated_accuracy_decided"] = float(said in example.answers)
        return values


def choose(edited: Edited, prompts: Sequence[str], options: Sequence[Sequence[str]], batch_size: int = 32) -> list[int]:
    """Index of the option with the highest probability after each prompt, the sum over its tokens' log-probabilities.

    Where all options of a prompt differ in their last token alone, one pass ranks them; otherwise each option is one.
    """
    chosen: dict[int, int] = {}
    longer = []
    tokenizer = edited.backbone.tokenizer
    tokens: dict[int, list[int]] = {}
    for i, (prompt, some) in enumerate(zip(prompts, options, strict=True)):
        rows = [encode(tokenizer, prompt, option) for option in some]
        if all(r.ids[:-1] == rows[0].ids[:-1] for r in rows):
            tokens[i] = [r.ids[-1] for r in rows]
        else:
            longer.append(i)
    vocabulary = edited.backbone.model.config.get_text_config().vocab_size
    ranked = list(tokens)
    for at in range(0, len(ranked), AT_ONCE):
        some = ranked[at : at + AT_ONCE]
        scores = edited.score([prompts[i] for i in some], [options[i][0] for i in some], batch_size, top_k=vocabulary)
        for i, score in zip(some, scores, strict=True):
            ranks = [int((score.top[-1] == token).nonzero()[0]) for token in tokens[i]]
            chosen[i] = ranks.index(min(ranks))
    pairs = [(prompts[i], option) for i in longer for option in options[i]]
    if pairs:
        asked, targets = map(list, zip(*pairs, strict=True))
        sums = iter([float(score.log_probs.sum()) for score in edited.score(asked, targets, batch_size)])
        for i in longer:
            found = [next(sums) for _ in options[i]]
            chosen[i] = found.index(max(found))
    return [chosen[i] for i in range(len(prompts))]
