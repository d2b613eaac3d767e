"""Fine-tuning of the demo's tower: a classifier on its embedding is trained with it and thrown away afterwards."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from hf_timm_tower import TimmModel

BATCH = 64
LEARNING_RATE = 5e-3
# Embeddings have length 1, so their products with the classifier's rows need a wider range to become logits.
SCALE = 16.0


@dataclass(frozen=True)
class Split:
    """Prepared images `[N, 3, H, W]` and labels `[N]`: those to learn from and those held out."""

    train_inputs: torch.Tensor
    train_labels: torch.Tensor
    test_inputs: torch.Tensor
    test_labels: torch.Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares of held-out images, 0 to 1: `classifier` by the trained classifier, `neighbour` by the nearest image."""

    classifier: float
    neighbour: float


def measure(tower: TimmModel, classifier: nn.Linear, data: Split, name: str | None = None) -> Accuracy:
    """Accuracy on the held-out images."""
    train, test = (_embedded(tower, inputs, name) for inputs in (data.train_inputs, data.test_inputs))
    with torch.no_grad():
        by_classifier = classifier(test).argmax(1)
    by_neighbour = data.train_labels[(test @ train.T).argmax(1)]
    return Accuracy(*((found == data.test_labels).float().mean().item() for found in (by_classifier, by_neighbour)))


def _embedded(tower: TimmModel, inputs: torch.Tensor, name: str | None) -> torch.Tensor:
    """Embeddings of inputs that are prepared already, as the training has them; a progress bar if named."""
    tower.eval()
    batches = inputs.split(BATCH)
    with torch.no_grad(), tqdm(batches, desc=name, disable=None if name else True, leave=False) as bar:
        return torch.cat([tower(batch) for batch in bar])


def fine_tune(tower: TimmModel, classifier: nn.Linear, data: Split, epochs: int) -> None:
    """Train whatever `tower.lock` left open, and the classifier; ends in eval mode."""
    weights = [weight for weight in (*tower.parameters(), *classifier.parameters()) if weight.requires_grad]
    steps = epochs * -(-len(data.train_labels) // BATCH)
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with tqdm(total=steps, desc="  fine-tuning", unit="step", disable=None) as bar:
        for epoch in range(epochs):
            tower.train()
            total = 0.0
            for batch in torch.randperm(len(data.train_labels)).split(BATCH):
                logits = SCALE * classifier(tower(data.train_inputs[batch]))
                loss = F.cross_entropy(logits, data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
                bar.update()
            found = measure(tower, classifier, data)
            bar.write(
                f"  epoch {epoch + 1}/{epochs}  loss {total / len(data.train_labels):.3f}  "
                f"held out: classifier {found.classifier:.1%}, nearest neighbour {found.neighbour:.1%}"
            )
    tower.eval()
