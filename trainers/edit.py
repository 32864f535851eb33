"""Edit with an exported editor, or one that needs no training: `python -m trainers.edit --editor DIR --edits FILE`.

With a training-free editor: `python -m trainers.edit --editor memit --backbone.source NAME --edits FILE --prompt ...`.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from datamodules.readers.requests import read_requests
from modules.backbone import Backbone, BackboneConfig
from modules.editor import Edited
from modules.remembering import Remembering
from modules.saved_edits import kept_without
from modules.training_free.icl import Unedited
from trainers.command import run
from trainers.editors import Spec, read
from trainers.workers import Specs, build
from trainers.written import check_folder


def edit(
    editor: Spec,
    edits: str | None = None,
    prompt: list[str] | None = None,
    pool: str | None = None,
    remove: str | None = None,
    save: str | None = None,
    merge: str | None = None,
    max_new_tokens: int = 12,
    compare: bool = True,
    backbone: BackboneConfig | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Make edits and show what the model says before and after.

    Args:
        editor: a folder written by trainers.export; or a training-free editor, by the name of a config in
            configs/training_free, by a file's path, or as a mapping with changes ({editor: memit, weight: 1500}).
        edits: a file of edits: JSON or JSON Lines with prompt and target, or text, one statement a line.
        prompt: what to ask; without it, prompts are read from standard input, one a line.
        pool: edits saved earlier, to go on from.
        remove: a file of edits to take out again.
        save: a folder to save the edits to.
        merge: a folder to write a plain model to, with the edits in its weights (of editors that change weights).
        max_new_tokens: how long answers may get.
        compare: also show the answer before editing.
        backbone: what a training-free editor edits, as --backbone.source NAME; an exported one brings its own.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
        trust_remote_code: run code that the model's repository ships, where an exported editor asks for it.
    """
    _check_folders(pool=pool, save=save, merge=merge)
    requests = read_requests(edits) if edits else []
    gone = read_requests(remove) if remove else []
    if not requests and not pool:
        raise ValueError("nothing to edit: give --edits FILE, or --pool DIR with a saved pool")
    (wanted,) = read([editor])
    exported = isinstance(wanted, Path)
    if exported and backbone:
        raise ValueError("--backbone: an exported editor brings its own; leave it out")
    specs = Specs(
        None if exported else backbone or BackboneConfig(),
        (editor,),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    model, (chosen,) = build(specs)
    loaded = chosen.editor
    with ExitStack() as stack:
        empty = stack.enter_context(loaded.edit(model, []))
        _refuse(empty, loaded.name, pool=pool, remove=remove, save=save, merge=merge)
        edited: Any = _from_pool(loaded, empty, Path(pool)) if pool else empty
        if gone and not isinstance(edited, Remembering):  # before hours of editing that an error would lose
            kept_without([*getattr(edited, "requests", ()), *requests], gone)
        if requests:
            edited = stack.enter_context(edited.edit(requests))
        if gone:
            edited = edited.remove(gone)
        print(f"{len(getattr(edited, 'requests', requests))} edits in the pool", file=sys.stderr)
        if save:
            edited.save(Path(save))
        if merge:
            _merge(edited, Path(merge))
        for text in prompt or _from_standard_input():
            _show(model, edited, text, max_new_tokens, compare)


def _check_folders(pool: str | None, save: str | None, merge: str | None) -> None:
    """Refuse folders before anything is loaded: edits that were made must find where to go."""
    if pool and not Path(pool).is_dir():
        raise ValueError(f"--pool: there is no folder {pool}; give one that --save has written")
    for flag, given in (("--save", save), ("--merge", merge)):
        if given:
            check_folder(Path(given), flag)
    if merge and Path(merge).exists() and any(Path(merge).iterdir()):
        raise FileExistsError(f"--merge: {merge} is not empty; choose another folder, or remove it")
    if merge and save and Path(merge).resolve() == Path(save).resolve():
        raise ValueError(f"--save and --merge are both {merge}: a pool and a plain model need a folder each")


def _refuse(edited: Edited, name: str, **wanted: str | None) -> None:
    """Say what a method cannot do before anything is edited."""
    able = {
        "pool": hasattr(edited, "load") or type(edited).restored is not Edited.restored,
        "remove": hasattr(edited, "remove"),
        "save": type(edited).save is not Edited.save,
        "merge": hasattr(edited, "merge"),
    }
    reasons = {
        "pool": "it cannot go on from saved edits",
        "remove": "it cannot take single edits out",
        "save": "it has nothing to save",
        "merge": "its edits are no change of weights" + ("; --save keeps them" if able["save"] else ""),
    }
    for what, given in wanted.items():
        if given and not able[what]:
            raise ValueError(f"--{what}: not with {name}: {reasons[what]}")


def _from_pool(editor: Any, empty: Any, folder: Path) -> Edited:
    if hasattr(empty, "load"):  # of trained editors, whose edits go with their own model
        return type(empty).load(editor.model, folder)
    return empty.restored(folder)


def _merge(edited: Any, folder: Path) -> None:
    with redirect_stdout(sys.stderr):  # saving imports libraries that say so; only answers go to standard output
        edited.merge().save_pretrained(folder)
        edited.backbone.tokenizer.save_pretrained(folder)


def _from_standard_input() -> Iterator[str]:
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
