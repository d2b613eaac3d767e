"""The tower with its card and figures: into a folder, and from there to the Hub."""

from collections.abc import Mapping
from pathlib import Path

from hf_timm_tower import TimmTowerConfig, TimmTowerForImageClassification
from hf_timm_tower.core.card import describe_tower, make_card
from hf_timm_tower.core.checkpoint import CARD_NAME
from hf_timm_tower.hub import push_folder

from .arguments import FinetuneArguments
from .data import Data

_TASK = "image-classification"


class Publication:
    """A trained tower, and what its card says.

    Args:
        model: The tower.
        folder: Where it is saved.
        metrics: Name of a figure -> the figure, measured on the held-out images.
        data: What it was trained on.
    """

    def __init__(
        self, model: TimmTowerForImageClassification, folder: Path, metrics: Mapping[str, float], data: Data
    ) -> None:
        self.model, self.folder, self.metrics, self.data = model, folder, metrics, data

    def save(self) -> None:
        """Save the tower, then its card. What somebody wrote into the card since an earlier save is kept."""
        self.model.save_pretrained(self.folder)
        card = self.folder / CARD_NAME
        text = self.card(str(self.folder), card.read_text(encoding="utf-8") if card.exists() else None)
        card.write_text(text, encoding="utf-8")

    def push(self, repo_id: str, arguments: FinetuneArguments) -> str:
        """Push the saved folder in one commit; its address.

        Raises:
            HubError: the repository cannot be written.
        """
        return push_folder(
            self.folder,
            repo_id,
            self.card,
            commit_message="Fine-tuned tower",
            private=arguments.hub_private_repo,
            token=arguments.hub_token,
            branch=arguments.hub_revision,
        )

    def card(self, repo_id: str, existing: str | None) -> str:
        """The card, made anew or out of the existing one."""
        config = TimmTowerConfig.from_pretrained(self.folder)
        return make_card(
            config,
            describe_tower(self.model, config),
            existing=existing,
            repo_id=repo_id,
            metrics=self.metrics,
            evaluated_on=self.data.name,
            evaluated_task=_TASK,
            model_card_kwargs={"pipeline_tag": _TASK},
        )
