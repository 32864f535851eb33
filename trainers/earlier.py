"""A file of results that a later call adds to. What is finished there is never lost by it, all commands alike:

- what a call asks for and the file has is kept, and not run again; what failed is tried again
- what a call does not ask for stays in the file and its tables
- a file of another setup, or with results of an editor of the same name that was made of something else, is refused
  before any work: rows of two setups in one table could not be compared, and what took hours would be written over

Results of other code than today's are kept, and the call says so.

For this a report has `meta.setup`, by name all that its results hang on besides the editors; `made_of`, by editor what
it was made of (`trainers.made_of.of_facts`), of those that have results; and in `meta.earlier`, of each call before the
one that `meta` tells of, when and on what it ran.
"""

import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from trainers.made_of import same
from trainers.result_cache import code

REMEDY = "give another --out, or remove the file"


def read(out: Path, setup: Mapping[str, Any], editors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The report that a call goes on from; None where there is no file.

    Args:
        setup: as the call's own report will have it.
        editors: what those are made of that the call asks for.

    Raises:
        ValueError: for a file that the call must not write over; it says why.
    """
    try:
        old = json.loads(out.read_text(encoding="utf-8"))
        was, made = dict(old["meta"]["setup"]), dict(old["made_of"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out {out} is there, and is no file that this call can add to; {REMEDY}") from error
    setup = json.loads(json.dumps(setup))
    refuse(out, sorted(name for name in {*setup, *was} if setup.get(name) != was.get(name)))
    for name, now in editors.items():
        if name in made and not same(now, made[name]):
            raise ValueError(
                f"--out {out} has results of {name} as it was made of other arguments or files; {REMEDY}, or give this "
                "one a name, where it was not exported ({editor: ..., name: ...})"
            )
    return old


def refuse(out: Path, differing: Iterable[str]) -> None:
    """Refuse a file of another setup.

    Args:
        differing: what is not the same there, by name; nothing is refused where there is none.

    Raises:
        ValueError: names them.
    """
    if names := list(differing):
        raise ValueError(f"--out {out} has results of another setup, which differs in {', '.join(names)}; {REMEDY}")


def take(report: Mapping[str, Any], old: Mapping[str, Any], anew: Container[tuple[str, int]]) -> None:
    """Put the results of an earlier report into one that is filed alike, by editor and number of edits.

    Args:
        anew: the (editor, number of edits) that are to be run, which are left out.
    """
    for part in ("aggregate", "runs", "records"):
        for editor, sizes in old[part].items():
            for size, found in sizes.items():
                if (editor, int(size)) not in anew:
                    report[part].setdefault(editor, {})[size] = found


def calls(old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`meta.earlier` of a report that goes on from another one."""
    meta = old["meta"]
    told = ("date", "command", "hardware", "versions")
    return [*meta.get("earlier", []), {name: meta[name] for name in told if name in meta}]


def tell(console: Console, out: Path, kept: Iterable[str], besides: Iterable[str], codes: Iterable[str | None]) -> None:
    """Say what is taken over from a file.

    Args:
        kept: results that the call asks for, in words.
        besides: results that it does not ask for.
        codes: of each finished result, the code that computed it (`trainers.result_cache.code`); None: not known.
    """
    for what, names in (("kept from", list(kept)), ("not asked for, and stays in", list(besides))):
        if names:
            console.print(f"{what} {out}: {', '.join(names)}", highlight=False, soft_wrap=True)
    if others := sum(one != code() for one in codes):
        console.print(
            f"{others} of these results were computed by other code than today's and are kept; to compute them anew, "
            f"{REMEDY}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
