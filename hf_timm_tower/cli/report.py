"""What a command says: a table for people or one JSON object for programs; errors as one line, and exit codes."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import typer

_MOST_LETTERS = 10_000  # of one line
ERROR, INCOMPLETE, STOPPED = 1, 3, 130
"""Exit codes beside 0 and 2, which is wrong usage: it failed; it is done but for some images; it was stopped."""


@contextlib.contextmanager
def command(as_json: bool) -> Iterator[None]:
    """Run a command: errors of this package and of files become one line on stderr, and on stdout under `--json`."""
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped", as_json, STOPPED)
    except (ImportError, OSError) as error:
        fail(str(error), as_json)
    except Exception as error:
        from ..reader.errors import TowerError  # light, but only where it is needed

        if not isinstance(error, TowerError):
            raise
        fail(str(error), as_json)


def fail(message: str, as_json: bool, code: int = ERROR) -> NoReturn:
    """Say why, end with this exit code."""
    line = printable(" ".join(message.split()))
    if as_json:
        print(json.dumps({"error": line}))
    else:
        print(f"hf-timm-tower: {line}", file=sys.stderr)
    raise typer.Exit(code)


def printable(value: Any) -> str:
    """Text that a stranger may have written, such as a file's name or a head's class: nothing a terminal acts on."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(value)[:_MOST_LETTERS])


def say(facts: Mapping[str, Any], as_json: bool) -> None:
    """Facts as one JSON object, or as a table of two columns."""
    if as_json:
        print(json.dumps(facts))  # escaped: a terminal would act on control characters of names
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        lines = value if isinstance(value, (list, tuple)) else [value]
        table.add_row(Text(name, style="bold"), Text("\n".join(map(printable, lines))))
    Console().print(table)


def say_rows(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*names)
    for row in rows:
        table.add_row(*(Text(printable(value)) for value in row))
    Console().print(table)
