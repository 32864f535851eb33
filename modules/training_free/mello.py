"""MeLLo: a question is split into smaller ones; each answer is checked against the nearest edit (arXiv 2305.14795).

The model writes a subquestion and its answer; the edit nearest to the subquestion is put after "Retrieved fact:"; the
model says whether that contradicts its answer, takes the one that holds, and goes on until it writes a final answer.

Nothing is trained, and the model need not know that it is edited: all of it is text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from datamodules.tokens import encode
from modules.asked import question_of
from modules.backbone import Backbone
from modules.editor import Edited, TargetScore
from modules.memory import EditMemory, EncoderConfig
from modules.remembering import MemoryEditor, Remembering

QUESTION, SUBQUESTION, FACT, FINAL = "Question:", "Subquestion:", "Retrieved fact:", "Final answer:"
ROOM = 32  # tokens left for an answer
STEP = 24  # tokens written at a time
HOLDS = "The fact does not contradict the generated answer, so the intermediate answer is:"
CONTRADICTS = "The fact contradicts the generated answer, so the intermediate answer is:"

# Four questions of two to three hops; in each, some retrieved facts change the answer and some are about other things.
SHOTS = f"""\
{QUESTION} Which language is mainly spoken in the country where the Atacama Desert lies?
{SUBQUESTION} In which country does the Atacama Desert lie?
Generated answer: The Atacama Desert lies in Chile.
{FACT} The Atacama Desert lies in the country of Norway.
{CONTRADICTS} Norway
{SUBQUESTION} Which language is mainly spoken in Norway?
Generated answer: The language mainly spoken in Norway is Norwegian.
{FACT} The language mainly spoken in Brazil is Korean.
{HOLDS} Norwegian
{FINAL} Norwegian

{QUESTION} In which city was the author of "The Old Man and the Sea" born?
{SUBQUESTION} Who is the author of "The Old Man and the Sea"?
Generated answer: The author of "The Old Man and the Sea" is Ernest Hemingway.
{FACT} The author of "War and Peace" is Jules Verne.
{HOLDS} Ernest Hemingway
{SUBQUESTION} In which city was Ernest Hemingway born?
Generated answer: Ernest Hemingway was born in Oak Park.
{FACT} Ernest Hemingway was born in the city of Lisbon.
{CONTRADICTS} Lisbon
{FINAL} Lisbon

{QUESTION} What is the currency of the country in which the company that makes the Galaxy phones is based?
{SUBQUESTION} Which company makes the Galaxy phones?
Generated answer: The company that makes the Galaxy phones is Samsung.
{FACT} The company that makes the Walkman is Toyota.
{HOLDS} Samsung
{SUBQUESTION} In which country is Samsung based?
Generated answer: Samsung is based in South Korea.
{FACT} Samsung is based in the country of Egypt.
{CONTRADICTS} Egypt
{SUBQUESTION} What is the currency of Egypt?
Generated answer: The currency of Egypt is the Egyptian pound.
{FACT} The currency of Mexico is the rupee.
{HOLDS} Egyptian pound
{FINAL} Egyptian pound

{QUESTION} Which sport did the husband of Steffi Graf play?
{SUBQUESTION} Who is the husband of Steffi Graf?
Generated answer: The husband of Steffi Graf is Andre Agassi.
{FACT} Steffi Graf is married to Lionel Messi.
{CONTRADICTS} Lionel Messi
{SUBQUESTION} Which sport did Lionel Messi play?
Generated answer: The sport that Lionel Messi played is football.
{FACT} The sport that Roger Federer played is chess.
{HOLDS} football
{FINAL} football
"""


@dataclass
class MeLLo(MemoryEditor):
    """Questions answered hop by hop, each hop checked against the memory.

    Generation gives the final answer, or nothing where the model writes none, as published. A teacher-forced score is
    that of the target after the worked-through question and "Final answer:". A prompt that is no question is asked like
    one.

    Args:
        hops: subquestions of a question, at most.
        hop_tokens: the model's words between one retrieved fact and the next, in tokens at most.
        prompt_file: worked examples in the form of `SHOTS`, in place of these.
        encoder: finds the edit nearest to a subquestion (contriever-msmarco in the paper, by the product of vectors
            that are not of length 1).
    """

    hops: int = 4
    hop_tokens: int = 96
    prompt_file: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    name: ClassVar[str] = "mello"

    def __post_init__(self) -> None:
        if min(self.hops, self.hop_tokens) < 1:
            raise ValueError(f"mello: hops and hop_tokens must be at least 1, got {self.hops}, {self.hop_tokens}")

    @property
    def shots(self) -> str:
        """The worked examples.

        Raises:
            ValueError: for a file that cannot be read, or that shows none of the marks by which an answer is read.
        """
        if self.prompt_file is None:
            return SHOTS
        try:
            text = Path(self.prompt_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"mello: prompt_file {self.prompt_file} cannot be read: {error}") from error
        missing = [mark for mark in (QUESTION, SUBQUESTION, FACT, FINAL) if mark not in text]
        if missing:
            raise ValueError(f"mello: prompt_file {self.prompt_file} has no {missing[0]!r}; write it as SHOTS here")
        return text

    def unedited(self, backbone: Backbone) -> "Worked":
        """See `MemoryEditor.unedited`.

        Raises:
            ValueError: where the examples leave no room for a question.
        """
        shots = self.shots.rstrip() + "\n\n"
        used = len(encode(backbone.tokenizer, shots).ids)
        window = getattr(backbone.model.config, "max_position_embeddings", None)
        if window and used + 2 * self.hop_tokens > window:
            raise ValueError(
                f"mello: the examples have {used} tokens and the context window {window}, which leaves less than two "
                f"hops of hop_tokens {self.hop_tokens}; give shorter examples in prompt_file"
            )
        return Worked(self, backbone, EditMemory(self.sentences), shots)


@dataclass
class Trace:
    """A question as far as it is worked through.

    Args:
        text: from "Question:" on, to the end of a line.
        answer: the final answer, once there is one.
        open: whether the model is to go on.
    """

    text: str
    answer: str = ""
    open: bool = True

    def read(self, piece: str, last: bool = False) -> str | None:
        """Take in what the model wrote for a hop: the subquestion that a fact is wanted for, if it asks for one.

        What leads neither to a subquestion nor to an answer is dropped, and is the end.

        Args:
            last: no more subquestions are answered.
        """
        own = piece.partition(f"\n{QUESTION}")[0]
        before, fact, _ = own.partition(FACT)
        before, final, after = before.partition(FINAL)
        if final:
            self.answer = after.strip().partition("\n")[0].strip()
        questions = [line.removeprefix(SUBQUESTION) for line in before.splitlines() if line.startswith(SUBQUESTION)]
        self.open = bool(fact and questions and questions[-1].strip() and not final and not last)
        if final or self.open:
            self.text += before if before.endswith("\n") or not before else before + "\n"
        return questions[-1].strip() if self.open else None


class Worked(Remembering):
    """A model that works a question through before it answers. With no edits it is the unedited model."""

    editor: MeLLo

    def __init__(self, editor: MeLLo, backbone: Backbone, memory: EditMemory, context: str) -> None:
        super().__init__(editor, backbone, memory, context)
        self._plain = Edited(backbone)
        self._traces: dict[str, Trace] = {}
        self._before = self._length(context, bos=True)

    def like(self, memory: EditMemory) -> "Worked":
        """See `Remembering.like`."""
        return Worked(self.editor, self.backbone, memory, self.context)

    def work(self, prompts: Sequence[str], batch_size: int = 32) -> list[Trace]:
        """Each question, worked through as far as the model gets.

        Raises:
            ValueError: for an empty prompt, or one that leaves no room for an answer.
        """
        new = {p: Trace(f"{QUESTION} {question_of(p)}\n") for p in dict.fromkeys(prompts) if p not in self._traces}
        for prompt, trace in new.items():
            encode(self.backbone.tokenizer, prompt)  # an empty one is refused there
            if not self._fits(trace.text, ROOM):
                raise ValueError(f"mello: the question {prompt[:80]!r} is too long for the context window")
        for hop in range(self.editor.hops + 1):
            going = [trace for trace in new.values() if trace.open]
            asked: dict[int, str] = {}
            for i, piece in enumerate(self._written(going, batch_size)):
                if question := going[i].read(piece, last=hop == self.editor.hops):
                    asked[i] = question
            if not asked:
                break
            for i, near in zip(asked, self.memory.nearest(list(asked.values()), 1), strict=True):
                fact = f"{FACT} {near[0][0].statement}\n"
                going[i].open = self._fits(going[i].text + fact, ROOM)
                going[i].text += fact if going[i].open else ""
        self._traces |= new
        return [self._traces[p] for p in prompts]

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        """Log-probabilities of each target as the final answer to the worked-through question. See `Edited.score`."""
        if not len(self.memory):
            return self._plain.score(prompts, targets, batch_size, top_k)
        return super().score([t.text + FINAL for t in self.work(prompts, batch_size)], targets, batch_size, top_k)

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        """The final answers, "" where there is none. `max_new_tokens` is for a model without edits: how much is written
        here is the editor's `hop_tokens`."""
        if not len(self.memory):
            return self._plain.generate(prompts, max_new_tokens, batch_size)
        return [trace.answer for trace in self.work(prompts, batch_size)]

    def context_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The examples and what the question was worked through with, in tokens."""
        if not len(self.memory):
            return [0] * len(prompts)
        texts = [self.context + trace.text + FINAL for trace in self.work(prompts)]
        return [self._length(text) - self._length(prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def _written(self, traces: Sequence[Trace], batch_size: int) -> list[str]:
        """What the model writes after each text until it asks for a fact, or has given its final answer.

        Some tokens at a time, so that what is done does not wait for what never ends.
        """
        pieces = [""] * len(traces)
        going = list(range(len(traces)))
        for _ in range(0, self.editor.hop_tokens, STEP):
            going = [i for i in going if self._fits(traces[i].text + pieces[i], STEP + ROOM)]
            if not going:
                break
            new = super().generate([traces[i].text + pieces[i] for i in going], STEP, batch_size)
            for i, more in zip(going, new, strict=True):
                pieces[i] += more
            going = [i for i, more in zip(going, new, strict=True) if more and not done(pieces[i])]
        return pieces

    def _fits(self, text: str, room: int) -> bool:
        window = getattr(self.backbone.model.config, "max_position_embeddings", None)
        return not window or self._before + self._length(text) + room <= window

    def _length(self, text: str, bos: bool = False) -> int:
        return len(encode(self.backbone.tokenizer, text, bos=bos).ids)


def done(piece: str) -> bool:
    """Whether a hop is written to its end."""
    answered = piece.partition(FINAL)[2]
    return FACT in piece or "\n" in answered or f"\n{QUESTION}" in piece
