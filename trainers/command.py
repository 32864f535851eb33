"""A command from a typed function: its signature is the command line and the YAML schema."""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainers.cli import resolve_configs
from trainers.usage import Plain, told


def run(function: Callable[..., Any], args: Sequence[str] | None = None) -> Any:
    """Parse `--config NAME` and `--key value` into the function's arguments and call it.

    What a user did wrong (ValueError, what a method cannot do, files that are missing, in the way or not to be written)
    ends the program with exit code 1 and one line.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = parser_of(function)
    try:
        given: Any = parser.parse_args(appended(resolve_configs(sys.argv[1:] if args is None else args), function))
        built: Any = parser.instantiate_classes(given)
        return function(**{name: built[name] for name in inspect.signature(function).parameters})
    except (ValueError, NotImplementedError, OSError) as error:
        sys.exit(f"error: {told(error)}")


def parser_of(function: Callable[..., Any]) -> Plain:
    """What the command of a function takes; its help ends with what its file says of it, which has an example."""
    parser = Plain(
        prog=f"python -m trainers.{function.__name__}",
        description=(function.__doc__ or "").split("\n")[0],
        epilog=inspect.getdoc(inspect.getmodule(function)),
    )
    parser.add_argument("--config", action="config", help="YAML with these keys, by path or by bare name in configs/")
    parser.add_function_arguments(function)
    return parser


def appended(args: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """The arguments with every `--key text` of a list of texts as jsonargparse's `--key+ text`, so that it may be given
    more than once, a source `--data {format: ...}` likewise, and `--key 1,10` of a list of numbers as `--key [1,10]`. A
    value in brackets sets the whole list."""
    types = {f"--{n}": str(p.annotation) for n, p in inspect.signature(function).parameters.items()}
    found = list(args)
    for i, arg in enumerate(found):
        key, equals, value = arg.partition("=")
        value = value if equals else next(iter(found[i + 1 : i + 2]), "")
        if not value or value.startswith(("[", "--")):
            continue
        kind = types.get(key, "")
        if any(texts in kind for texts in ("list[str]", "list[dict[str")) or ("Source]" in kind and value[0] == "{"):
            found[i] = f"{key}+{equals}{value if equals else ''}"
        elif "list[int" in kind:
            found[i : i + 1 if equals else i + 2] = [f"{key}=[{value}]"]
    return found
