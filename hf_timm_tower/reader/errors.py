"""Every error this package raises on purpose.

Each also inherits the builtin that fits, so that callers who catch `ValueError` or `OSError` need not know us.
Messages say what was found, what was expected, where, and what to do. Text from a file or a repository goes into them
through `shown` alone.
"""

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SHORT = reprlib.Repr()
_MOST_LETTERS = 8000  # of an error; that of a head which cannot be stored gives a reason against every form
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxlevel = 4


class TowerError(Exception):
    """Base of all errors of hf_timm_tower.

    Its text has nothing that a terminal acts on and is no book, wherever a part of it came from.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= _MOST_LETTERS else f"{text[:-1000][: _MOST_LETTERS - 1000]} ... {text[-1000:]}"
        return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


class ConfigError(TowerError, ValueError):
    """A field of the config, or a constructor argument, has a value that cannot be used."""


class ArgumentError(TowerError, TypeError):
    """A keyword is unknown, or two arguments contradict each other."""


class HeadError(TowerError, ValueError):
    """A custom head cannot be stored, rebuilt or used."""


class GraphError(HeadError):
    """A head cannot be traced to a graph, or a stored graph is refused by the audit."""


class FolderError(TowerError, OSError):
    """A tower's folder cannot be read or written."""


class HubError(FolderError):
    """A repository of the Hub cannot be read or written."""


class FormatError(TowerError, ValueError):
    """A file of a tower is damaged, too large, or of an unknown format version."""


class WeightsError(TowerError, RuntimeError):
    """Weights do not fit the tower: missing, unexpected or wrongly shaped keys."""


class ExportError(TowerError, RuntimeError):
    """An exporter (ONNX, `torch.export`) cannot write the tower, or what it wrote gives another output."""


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn what transformers raises where a file of JSON is missing or holds no object into errors of ours."""
    try:
        yield
    except OSError as error:
        raise FolderError(one_line(error, 600)) from error
    except (AttributeError, KeyError, RecursionError, TypeError, UnicodeDecodeError) as error:
        raise FormatError(f"not a file of JSON that holds an object: {one_line(error)}") from error


def shown(thing: object, limit: int = 80) -> str:
    """Something foreign (a key, a name, a value of a file) for a message: quoted, printable, on one line, short.

    What a terminal or Markdown would act on (escape sequences, line feeds, text direction marks) is escaped, as `repr`
    does it; the cost does not grow with what is shown.
    """
    if isinstance(thing, int) and thing.bit_length() > 4 * limit:
        return f"a number of {thing.bit_length()} bits"
    _SHORT.maxstring = _SHORT.maxother = limit
    text = repr(thing[: limit + 1]) if isinstance(thing, str) else _SHORT.repr(thing)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(text: object, limit: int = 300) -> str:
    """What a library said, which may quote something foreign, for a message: on one line, short."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """` (did you mean ...?)`, or nothing where no known name is like this one."""
    near = difflib.get_close_matches(name[:64], known, n=2, cutoff=cutoff)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
