"""Edit with an exported editor: `python -m trainers.edit --editor DIR --edits FILE --prompt "..."`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from datamodules.readers.requests import read_requests
from modules.backbone import Backbone
from modules.editor import Edited
from modules.export import load_editor
from modules.training_free.icl import Unedited
from trainers.command import run


def edit(
    editor: str,
    edits: str | None = None,
    prompt: list[str] | None = None,
    pool: str | None = None,
    remove: str | None = None,
    save: str | None = None,
    merge: str | None = None,
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
        merge: a folder to write a plain model to, with the edits in its weights (of editors that change weights).
        max_new_tokens: how long answers may get.
        compare: also show the answer before editing.
    """
    requests = read_requests(edits) if edits else []
    gone = read_requests(remove) if remove else []
    if not requests and not pool:
        raise ValueError("nothing to edit: give --edits FILE, or --pool DIR with a saved pool")
    loaded = load_editor(editor)
    with loaded.edit(loaded.model.backbone, []) as empty:
        start = type(empty).load(loaded.model, Path(pool)) if pool else empty  # type: ignore[arg-type]
        edited = start.add(requests).remove(gone)
        print(f"{len(edited.requests)} edits in the pool", file=sys.stderr)
        if save:
            edited.save(Path(save))
        if merge:
            _merge(edited, Path(merge))
        for text in prompt or _from_standard_input():
            _show(loaded.model.reader, edited, text, max_new_tokens, compare)


def _merge(edited: Edited, folder: Path) -> None:
    if not hasattr(edited, "merge"):
        raise ValueError("--merge: the edits of this editor are no change of weights; --save keeps them")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--merge: {folder} is not empty; choose another folder, or remove it")
    with redirect_stdout(sys.stderr):  # saving imports libraries that say so; only answers go to standard output
        edited.merge().save_pretrained(folder)  # type: ignore[attr-defined]
        edited.backbone.tokenizer.save_pretrained(folder)


def _from_standard_input():
    if sys.stdin.isatty():
        print("prompts, one a line (end with ctrl-d):", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _show(original: Backbone, edited: Edited, prompt: str, length: int, compare: bool) -> None:
    after = edited.generate([prompt], length)[0]
    print(prompt)
    if compare:
        with Unedited().edit(original, []) as before:
            print(f"  before: {_line(before.generate([prompt], length)[0])}")
    print(f"  after:  {_line(after)}")


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run(edit)
