"""What is said of a command line or config that does not parse: the key, what is wrong with it, and the nearest key."""

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

KEY = re.compile(r'Parser key "(.+)":')
CLASS = re.compile(r"Problem with given class_path '(.+)':")
UNKNOWN = (
    re.compile(r"Option '(.+)' is not accepted"),
    re.compile(r"unrecognized arguments: --([^ =]+)"),
    re.compile(r"Group '(.+)' does not accept option '(.+)'"),
)
STRAY = re.compile(r"unrecognized arguments: (\S+)")
REQUIRED = re.compile(r"the following arguments are required: (.+)")
NOT_KEYS = "Expected a dot import path string:"  # where a class with arguments is wanted
EXPECTED = re.compile(r"Expected (?:an? )?(.+?)(?:\. Got value: (.*))?$")
GIVEN = re.compile(r"Given value: (?!NestedArg)(.+)")
UNION = "Does not validate against any of the Union subtypes"
# jsonargparse's frame around what is wrong, and what it says of the other types that a value might have had
FRAME = re.compile(
    rf"{UNION}|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>$|Expected a path|"
    r"Not a valid subclass|Subclass types expect|(- )?(a class path|a dict with)"
)

LIKE = 0.75  # how alike two keys must be for one to be named for the other


class Plain(ArgumentParser):
    """A parser whose errors are one line, without usage. It takes no abbreviated keys."""

    file: Any = None  # the config that is being read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        self.file = cfg_path
        parsed = super().parse_path(cfg_path, *args, **kwargs)
        self.file = None
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:
            sys.stderr.write(f"error: {plain(message, self)}{f' (in {self.file})' if self.file else ''}\n")
            sys.exit(2)
        super().error(message, ex)  # within another parser, which will say it


def plain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message in a line: of the innermost thing that is wrong in it, which is what a user wrote.

    Its lines are nested by indentation: keys, and classes whose arguments they are. A message of another shape is kept.
    """
    required = REQUIRED.match(message)
    if required:
        return f"{required[1]} must be given, as --KEY VALUE or in a --config; {_help(parser)}"
    found = list(_leaves(message))
    if not found:
        return " ".join(message.split())
    deepest = max(len(where) for where, _ in found)
    where, first = next((where, said) for where, said in found if len(where) == deepest)
    for pattern in UNKNOWN:
        unknown = pattern.match(first)
        if unknown:
            return _unknown(where, ".".join(unknown.groups()), parser)
    stray = STRAY.match(first)
    if stray:
        return f"{stray[1]} belongs to no key: keys begin with --, and a value with spaces stands in quotes"
    given = GIVEN.search(message)
    said = _value(list(dict.fromkeys(said for at, said in found if at == where)), given[1] if given else None)
    return f"--{_path(where)}: {said}" if where else " ".join(message.split())


def told(error: Exception) -> str:
    """What an error says; of a class that refused its arguments, without jsonargparse's frame around that."""
    message = str(error)
    return "\n".join(said for _, said in _leaves(message)) if message.startswith(UNION) else message


def _leaves(message: str) -> Iterator[tuple[tuple[str | type, ...], str]]:
    """What is wrong, each with the keys and classes that it stands under."""
    above: list[tuple[int, str | type]] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        if not text or FRAME.match(text):
            continue
        above = [(at, one) for at, one in above if at < indent]
        key, kind = KEY.match(text), CLASS.match(text)
        if key:
            above.append((indent, key[1]))
        elif kind:
            above.append((indent, _class(kind[1])))
        else:
            yield tuple(one for _, one in above), text


def _class(path: str) -> str | type:
    """The class at a path; where there is none, the key that should name it."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return "class_path"


def _path(where: Iterable[str | type]) -> str:
    """As a user writes it: the arguments of a class that a config names stand under init_args."""
    parts = [("" if is_dataclass(one) else "init_args") if isinstance(one, type) else one for one in where]
    return ".".join(filter(None, parts))


def _value(said: Sequence[str], given: str | None) -> str:
    """What was expected of a value, of all the types that it might have had, and what was given."""
    if said[0].startswith(NOT_KEYS):
        return f"expected keys of its own, as {{KEY: VALUE}}, which --help lists; got{said[0].removeprefix(NOT_KEYS)}"
    expected = [match for match in map(EXPECTED.match, said) if match]
    if not expected:
        return said[0]
    kinds = []
    for match in expected:
        choice = re.fullmatch(r"typing\.Literal\[(.+)\]", match[1])
        kinds.append(f"one of {choice[1]}" if choice else re.sub(r"<class '(?:.+\.)?(.+)'>", r"\1", match[1]))
    got = next((match[2] for match in expected if match[2] is not None), given)
    listed = "a list, as [A, B]" if kinds[0] in ("list", "Sequence") else " or ".join(kinds)
    return f"expected {listed}{'' if got is None else f', got {got}'}"


def _unknown(where: tuple[str | type, ...], key: str, parser: ArgumentParser) -> str:
    kind = where[-1] if where else None
    known = _keys(_of(kind) if isinstance(kind, type) else parser)
    before = f"--{_path(where)}." if where else "--"
    near = nearest(key, known)
    own = [name for name in known if "." not in name]
    if near:
        remedy = f"the nearest is {before}{near}"
    elif isinstance(kind, type) and own:
        remedy = f"there are: {', '.join(own)}"
    else:
        remedy = _help(parser)
    return f"{before}{key}: no such key; {remedy}"


def _of(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def _keys(parser: ArgumentParser) -> list[str]:
    hidden = (argparse._HelpAction,)
    names = [a.dest for a in parser._actions if a.option_strings and not isinstance(a, hidden)]
    return [name for name in names if not name.endswith(".help") and name != "print_config"]


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key most like `key`, if any: by its first part (`modle.a.b`), its last (`max_steps`), or as a whole."""
    known = list(known)
    first, dot, rest = key.partition(".")
    groups = list(dict.fromkeys(name.split(".")[0] for name in known))
    ends = [name for name in known if name.endswith(f".{key}")]
    if len(ends) == 1:
        return ends[0]
    if dot and first not in groups:
        close = get_close_matches(first, groups, 1, LIKE)
        return f"{close[0]}.{rest}" if close else None
    return next(iter(get_close_matches(key, known, 1, LIKE)), None)


def _help(parser: ArgumentParser) -> str:
    return f"`{parser.prog} --help` lists them all"
