"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table of cells that hold no bar.

    Args:
        texts: so many columns are of text; those after them are of numbers, and stand right.
    """
    ruled = ["---" if i < texts else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ruled, *rows))
