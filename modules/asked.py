"""Prompts of which only the end is asked: before it stand solved questions, which show what an answer looks like."""


class Asked(str):
    """Solved questions, then a question; as text, all of it.

    Editors that look for the edit that a prompt is about look at the question alone: the solved ones before it name
    facts of their own, which may have been edited too.

    Args:
        shots: the solved questions, to the end of a line.
        text: the question as it is put, such as "Q: ... A:".
        question: the question itself; by default `text`.
    """

    shots: str
    text: str
    question: str

    def __new__(cls, shots: str, text: str, question: str | None = None) -> "Asked":
        prompt = super().__new__(cls, shots + text)
        prompt.shots, prompt.text, prompt.question = shots, text, text if question is None else question
        return prompt

    def __getnewargs__(self) -> tuple[str, str, str]:  # type: ignore[override]
        return self.shots, self.text, self.question


def question_of(prompt: str) -> str:
    """What of a prompt is asked."""
    return prompt.question if isinstance(prompt, Asked) else prompt


def parts_of(prompt: str) -> tuple[str, str]:
    """The solved questions that a prompt begins with, "" where there are none, and the rest."""
    return (prompt.shots, prompt.text) if isinstance(prompt, Asked) else ("", prompt)
