"""Two image towers: what is particular to them in training, and what they become."""

from pathlib import Path
from typing import Any

import torch

from hf_timm_tower import TimmModel, TimmTowerImageProcessor

from .data import Data
from .options import Options
from .publishing import NotTheSame, write_card
from .towers import TwoImages, make_second_tower, make_tower
from .training import batches_of, on_device_of

CHECKED = 16
USAGE = """
Two towers trained on pairs of images by hf_timm_tower's
`scripts/train_clip.py` with the {loss} loss: `{architectures[0]}` for the image, `{architectures[1]}` for its partner.
Of {count} images held out, {accuracy:.1%} were closest to their own partner.

```python
from hf_timm_tower import TimmModel

image = TimmModel.from_pretrained("{name}", subfolder="image")
second = TimmModel.from_pretrained("{name}", subfolder="second")
```

Embeddings are compared by cosine{scaling}.
"""


class WithPairs:
    """Two image towers, to be trained together.

    Args:
        options: Which ones.

    Attributes:
        module: The two.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.module = TwoImages(make_tower(options), make_second_tower(options), options.loss)
        towers = self.module.image_towers
        self.processors = {
            name: TimmTowerImageProcessor.from_tower_config(tower.config) for name, tower in towers.items()
        }

    def collate(self, pairs: list[tuple[Any, Any]]) -> dict[str, torch.Tensor]:
        """Pairs of images -> the module's arguments."""
        images, partners = zip(*pairs, strict=True)
        return {
            "pixel_values": self.processors["image"](list(images), return_tensors="pt")["pixel_values"],
            "second_pixel_values": self.processors["second"](list(partners), return_tensors="pt")["pixel_values"],
        }

    @torch.no_grad()
    def accuracy(self, data: Data) -> float:
        """Share of images held out whose own partner is the closest of all partners held out."""
        module = self.module.eval()
        pairs = list(zip(data.held_out.images, data.held_out.pairs or [], strict=True))
        made = [
            module(**on_device_of(module, self.collate(part)))[:2]
            for part in batches_of(pairs, self.options.batch_size)
        ]
        images, partners = (torch.cat(parts) for parts in zip(*made, strict=True))
        found = (images @ partners.T).argmax(1)
        return (found == torch.arange(len(found), device=found.device)).float().mean().item()

    def save(self, folder: Path, data: Data, accuracy: float) -> None:
        """Write both towers, each as one, and a card."""
        towers = self.module.image_towers
        for name, tower in towers.items():
            tower.save_pretrained(folder / name)
        bias = self.module.logit_bias
        about = {
            "architectures": [tower.config.architecture for tower in towers.values()],
            "loss": {"clip": "CLIP", "siglip": "SigLIP"}[self.options.loss],
            "count": len(data.held_out.images),
            "accuracy": accuracy,
            "name": self.options.push_to_hub or folder.name,
            "scaling": f"; the loss multiplies it with {self.module.log_scale.exp().item():.6g}"
            + ("" if bias is None else f" and adds {bias.item():.6g}"),
        }
        write_card(folder, folder.name, USAGE.format(**about), [self.options.loss], "image-feature-extraction")

    def check(self, place: str, data: Data) -> None:
        """Both towers of a folder or repository give the trained ones' embeddings.

        Raises:
            NotTheSame: they do not.
        """
        images = {"image": data.held_out.images, "second": data.held_out.pairs}
        for name, trained in self.module.image_towers.items():
            some = [images[name][i] for i in range(min(CHECKED, len(images[name])))]
            pixels = self.processors[name](some, return_tensors="pt")["pixel_values"]
            tower = TimmModel.from_pretrained(place, subfolder=name)
            with torch.no_grad():
                if not torch.equal(tower(pixels), trained(pixels).pooler_output):
                    raise NotTheSame(f"{place}/{name}: the tower's embeddings are not those of the trained one")
