"""One call in a process of its own, forked from one that has imported everything; and what it came to."""

import json
import os
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_timm_tower import TowerError

from .models import DiffersError, NotThereError, quiet

Call = Callable[[Path], str | None]
WORKS, REFUSED, ABSENT, RAW, DIFFERS = "works", "refused", "not there", "raw error", "silently different"

# What a library raises on purpose, with words for its users; everything else came from further inside.
_ON_PURPOSE = (TowerError, ValueError, NotImplementedError, ImportError, OSError)
_LONGEST = 150


@dataclass(frozen=True)
class Outcome:
    """What a call came to.

    Attributes:
        status: One of the five above.
        text: A figure, or the error's first words.
    """

    status: str
    text: str = ""

    def cell(self) -> str:
        """As a cell of a table in Markdown."""
        text = self.text.replace("|", "\\|").replace("`", "")
        return self.status if not text else f"{self.status}: {text}"


def outcome_of(call: Call, models: Path, timeout: int = 300) -> Outcome:
    """Run a call in a forked process, in a folder of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            quiet()
            with tempfile.TemporaryDirectory() as scratch:
                os.chdir(scratch)
                found = _run(call, models)
            with os.fdopen(write, "w") as pipe:
                json.dump([found.status, found.text], pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        data = pipe.read()
    _, ended = os.waitpid(pid, 0)
    return Outcome(*json.loads(data)) if data else Outcome(RAW, f"the process ended with {ended}")


def _run(call: Call, models: Path) -> Outcome:
    try:
        return Outcome(WORKS, call(models) or "")
    except NotThereError as error:
        return Outcome(ABSENT, str(error))
    except DiffersError as error:
        return Outcome(DIFFERS, str(error))
    except Exception as error:
        if os.environ.get("PEERS_TRACE"):
            traceback.print_exc()
        text = " ".join(str(error).replace(str(models), "...").split())
        text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)  # addresses differ from run to run
        short = text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()}..."
        return Outcome(REFUSED if isinstance(error, _ON_PURPOSE) else RAW, f"{type(error).__name__}: {short}")
