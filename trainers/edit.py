"""Edit with an exported editor: `python -m trainers.edit --editor DIR --edits FILE --prompt "..."`."""

import sys
from pathlib import Path

from datamodules.readers.requests import read_requests
from modules.export import load_editor
from modules.gist.editor import GistEdited, GistEditor
from modules.training_free.icl import Unedited
from trainers.command import run


def edit(
    editor: str,
    edits: str | None = None,
    prompt: list[str] | None = None,
    pool: str | None = None,
    remove: str | None = None,
    save: str | None = None,
    max_new_tokens: int = 12,
    compare: bool = True,
) -> None:
    """Make edits with an exported editor and show what the model says before and after.

    Args:
        editor: a folder written by trainers.export.
        edits: a file of edits: JSON or JSON Lines with prompt and target, or text, one statement a line.
        prompt: what to ask; without it, prompts are read from standard input, one a line.
        pool: a pool saved earlier, to go on from.
        remove: a file of edits to take out of the pool.
        save: a folder to save the pool to.
        max_new_tokens: how long answers may get.
        compare: also show the answer before editing.
    """
    requests = read_requests(edits) if edits else []
    gone = read_requests(remove) if remove else []
    if not requests and not pool:
        raise ValueError("nothing to edit: give --edits FILE, or --pool DIR with a saved pool")
    loaded = load_editor(editor)
    start = GistEdited.load(loaded.model, Path(pool)) if pool else None
    with loaded.edit(loaded.model.backbone, []) as empty:
        edited = (start or empty).add(requests).remove(gone)  # type: ignore[attr-defined]
        print(f"{len(edited.pool)} edits in the pool", file=sys.stderr)
        if save:
            edited.save(Path(save))
        for text in prompt or _from_standard_input():
            _show(loaded, edited, text, max_new_tokens, compare)


def _from_standard_input():
    if sys.stdin.isatty():
        print("prompts, one a line (end with ctrl-d):", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _show(editor: GistEditor, edited: GistEdited, prompt: str, length: int, compare: bool) -> None:
    after = edited.generate([prompt], length)[0]
    print(prompt)
    if compare:
        with Unedited().edit(editor.model.reader, []) as before:
            print(f"  before: {_line(before.generate([prompt], length)[0])}")
    print(f"  after:  {_line(after)}")


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run(edit)
