"""Faults on demand. A rule says which requests it meets and what happens to them.

As words (`--fault`) or as JSON (`/_local/faults`), with these keys:

    method   regular expression for the whole method; default any
    path     regular expression to be found in the raw path; default any
    nth      meet only the n-th matching request, from 1; default every one
    times    meet at most so many; default no limit

    status   answer with this status instead (the request's body is read to its end first, and nothing is done)
    retry_after   with status: seconds in a Retry-After header
    cut      "down": send so many bytes of the answer's body as `after` says, then close the connection
             "up": close the connection after so many bytes of the request's body, unanswered
             "answer": do all that was asked, then close the connection without a word
    after    bytes; default 0
    corrupt  flip the bits of this byte of the answer's body; negative counts from its end
    rate     bytes per second, both ways
"""

import re
import shlex
import threading
from dataclasses import asdict, dataclass, fields
from typing import Any

_CUTS = ("down", "up", "answer")
_NUMBERS = ("nth", "times", "status", "retry_after", "after", "corrupt", "rate")


@dataclass
class Rule:
    """One rule; see the module. `seen` and `met` count matching requests and those that had the fault."""

    method: str = ".*"
    path: str = ""
    nth: int | None = None
    times: int | None = None
    status: int | None = None
    retry_after: int | None = None
    cut: str | None = None
    after: int = 0
    corrupt: int | None = None
    rate: int | None = None
    seen: int = 0
    met: int = 0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"fault: {name} must be a whole number, found {value!r}")
        if self.cut is not None and self.cut not in _CUTS:
            raise ValueError(f"fault: cut must be one of {', '.join(_CUTS)}, found {self.cut!r}")
        if self.status is not None and not 200 <= self.status <= 599:
            raise ValueError(f"fault: status must be 200 to 599, found {self.status}")
        if self.rate is not None and self.rate < 1:
            raise ValueError(f"fault: rate must be at least 1 byte per second, found {self.rate}")
        if (self.status, self.cut, self.corrupt, self.rate) == (None,) * 4:
            raise ValueError("fault: nothing to do; give status, cut, corrupt or rate")
        for name in ("method", "path"):
            try:
                re.compile(getattr(self, name))
            except (re.error, TypeError) as error:
                raise ValueError(f"fault: {name} is not a regular expression: {error}") from error

    def name(self) -> str:
        """What it does, in a word for the log."""
        if self.status is not None:
            return f"status {self.status}"
        if self.cut is not None:
            return f"cut {self.cut}"
        return "corrupt" if self.corrupt is not None else "rate"


_SETTABLE = {field.name for field in fields(Rule)} - {"seen", "met"}


def from_json(value: Any) -> Rule:
    """A rule from a decoded JSON object. Raises ValueError for anything else, unknown keys included."""
    if not isinstance(value, dict):
        raise ValueError(f"fault: expected an object, found {value!r:.100}")
    unknown = sorted(set(value) - _SETTABLE)
    if unknown:
        raise ValueError(f"fault: unknown {', '.join(map(repr, unknown))}; known are {', '.join(sorted(_SETTABLE))}")
    return Rule(**value)


def from_words(text: str) -> Rule:
    """A rule from words such as `status=503 path=/resolve/ nth=2`; quotes as in a shell. Raises ValueError."""
    value: dict[str, Any] = {}
    for word in shlex.split(text):
        key, equals, found = word.partition("=")
        if not equals:
            raise ValueError(f"fault: expected key=value, found {word!r}")
        value[key] = int(found) if key in _NUMBERS and re.fullmatch(r"-?\d+", found) else found
    return from_json(value)


class Faults:
    """The rules in force; safe to use from several threads."""

    def __init__(self, rules: list[Rule]) -> None:
        self._rules = rules
        self._lock = threading.Lock()

    def replace(self, rules: list[Rule]) -> None:
        with self._lock:
            self._rules = rules

    def as_json(self) -> list[dict[str, Any]]:
        with self._lock:
            return [asdict(rule) for rule in self._rules]

    def take(self, method: str, path: str) -> list[Rule]:
        """The rules that this request meets; counts it."""
        met = []
        with self._lock:
            for rule in self._rules:
                if not re.fullmatch(rule.method, method) or not re.search(rule.path, path):
                    continue
                rule.seen += 1
                if rule.nth in (None, rule.seen) and (rule.times is None or rule.met < rule.times):
                    rule.met += 1
                    met.append(rule)
        return met
