"""The tower with its card and figures: into a folder, and from there to the Hub."""

from collections.abc import Mapping
from pathlib import Path

from hf_timm_tower import TimmTowerForImageClassification

from .arguments import FinetuneArguments
from .data import Data


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
        """Save the tower with its card. What somebody wrote into the card since an earlier save is kept."""
        self.model.save_pretrained(
            self.folder, repo_id=str(self.folder), metrics=self.metrics, evaluated_on=self.data.name
        )

    def push(self, repo_id: str, arguments: FinetuneArguments) -> str:
        """Push the tower in one commit; its address.

        Raises:
            HubError: the repository cannot be written.
        """
        return self.model.push_to_hub(
            repo_id,
            commit_message="Fine-tuned tower",
            private=arguments.hub_private_repo,
            token=arguments.hub_token,
            revision=arguments.hub_revision,
            metrics=self.metrics,
            evaluated_on=self.data.name,
        )
