"""What the caller of a save or a push wants in the card, kept until the card is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reader.config import TimmTowerConfig
from ..reader.errors import ArgumentError
from .card import TowerFacts, make_card

_FIGURES = ("metrics", "evaluated_on", "evaluated_task")


@dataclass(frozen=True)
class CardOptions:
    """See `card.make_card`.

    Attributes:
        tags: Further tags.
        license: Identifier of the license.
        more: `model_card_kwargs`: further metadata, and the figures in the form `{"metrics": {...}, ...}`.
        metrics: Name of a metric -> figure.
        evaluated_on: Id of the data set that they were measured on.
        include_code: Whether `core/` travels with the tower.
        repo_id: What the snippets load.
    """

    tags: tuple[str, ...] = ()
    license: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] | None = None
    evaluated_on: str | None = None
    include_code: bool = True
    repo_id: str | None = None

    def make(self, facts: TowerFacts, stored: TimmTowerConfig, existing: str | None) -> str:
        """The card of a tower, made anew or out of the existing one.

        Args:
            facts: The tower's.
            stored: Its config as it is saved.
            existing: The card that is there, None where there is none.

        Raises:
            ArgumentError: no card can hold what was asked for.
        """
        more = dict(self.more)
        figures: dict[str, Any] = {"metrics": self.metrics, "evaluated_on": self.evaluated_on}
        for name in _FIGURES:
            # A list of metrics is metadata of its own: names without figures.
            if name not in more or (name == "metrics" and not isinstance(more[name], Mapping)):
                continue
            given = more.pop(name)
            if figures.get(name) not in (None, given):
                raise ArgumentError(
                    f"{name}={figures[name]!r} and model_card_kwargs[{name!r}]={given!r} contradict each other"
                )
            figures[name] = given
        return make_card(
            stored,
            facts,
            existing=existing,
            repo_id=self.repo_id,
            tags=self.tags,
            license=self.license,
            include_code=self.include_code,
            model_card_kwargs=more,
            **figures,
        )


def as_tags(tags: str | Sequence[str] | None) -> tuple[str, ...]:
    """Tags as transformers takes them: several, one alone, or none."""
    return (tags,) if isinstance(tags, str) else tuple(tags or ())
