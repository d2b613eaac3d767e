"""Image tower and text model: what is particular to them in training, and what they become."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import VisionTextDualEncoderProcessor, pipeline

from hf_timm_tower import TimmModel, TimmTowerImageProcessor, make_self_contained

from .data import Data, Examples
from .options import Options
from .publishing import NotTheSame, write_card
from .text import load_text_model, make_text_model, make_vocabulary
from .towers import ImageAndText, make_tower
from .training import batches_of, on_device_of

TOWER = "vision"  # the folder of the image tower by itself
CHECKED_IMAGES, CHECKED_LABELS = 16, 16
USAGE = """
Trained by hf_timm_tower's `scripts/train_clip.py`: `{architecture}` and {text} with the {loss} loss. Of {count} images
held out, {accuracy:.1%} were given the right one of {labels} labels.

```python
import hf_timm_tower  # makes towers known to transformers
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", "{name}")
classify(image, candidate_labels=[...], hypothesis_template="{template}")
```

transformers warns that it has no such model on this pipeline's list; the pipeline works all the same. Where
`hf_timm_tower` is not installed, leave out its import and pass `trust_remote_code=True`: the code is
`modeling_timm_tower.py`.

The image tower by itself: `hf_timm_tower.TimmModel.from_pretrained("{name}", subfolder="vision")`.
"""


class WithText:
    """A tower and a text model, to be trained together.

    Args:
        options: Which ones.
        data: Whose captions give a new text model its words.

    Attributes:
        module: The two.
    """

    def __init__(self, options: Options, data: Data) -> None:
        self.options = options
        if options.text_model is not None:
            text_model, self.tokenizer = load_text_model(options.text_model)
        else:
            captions = chain.from_iterable(data.train.captions or [])
            text_model, self.tokenizer = make_text_model(make_vocabulary(captions))
        tower = make_tower(options)
        self.image_processor = TimmTowerImageProcessor.from_tower_config(tower.config)
        self.module = ImageAndText(tower, text_model, options.embed_dim, options.loss)

    def collate(self, pairs: list[tuple[Any, str]]) -> dict[str, torch.Tensor]:
        """Images and captions -> the module's arguments."""
        images, captions = zip(*pairs, strict=True)
        return {**self.image_processor(list(images), return_tensors="pt"), **self._tokens(list(captions))}

    @torch.no_grad()
    def accuracy(self, data: Data) -> float:
        """Share of images held out that are given the right label."""
        module = self.module.eval()
        size = self.options.batch_size
        captions = [data.template.format(label) for label in data.labels]
        texts = [module.embed_texts(**on_device_of(module, self._tokens(part))) for part in batches_of(captions, size)]
        found = []
        for part in batches_of(data.held_out.images, size):
            images = module.embed_images(**on_device_of(module, self.image_processor(part, return_tensors="pt")))
            found += (images @ torch.cat(texts).T).argmax(1).tolist()
        return sum(map(int.__eq__, found, data.answers)) / len(found)

    @torch.no_grad()
    def scores(self, data: Data) -> list[dict[str, float]]:
        """What the trained model gives some images held out: label -> probability, each image run by itself."""
        labels = data.labels[:CHECKED_LABELS]
        tokens = self._tokens([data.template.format(label) for label in labels])
        found = []
        for image in _some(data.held_out):
            pixels = self.image_processor([image], return_tensors="pt")
            chances = self.module.model(**on_device_of(self.module, {**pixels, **tokens})).logits_per_image.softmax(-1)
            found.append(dict(zip(labels, chances[0].tolist(), strict=True)))
        return found

    def save(self, folder: Path, data: Data, accuracy: float) -> None:
        """Write the two as one model, the processor, a card, and the image tower by itself."""
        model, bias = self.module.model, self.module.logit_bias
        if bias is not None:
            # The model has no parameter for it. Softmax over labels does not need it; for sigmoid it is here.
            model.config.logit_bias = bias.item()
        model.save_pretrained(folder)
        make_self_contained(folder)
        VisionTextDualEncoderProcessor(self.image_processor, self.tokenizer).save_pretrained(folder)
        model.vision_model.save_pretrained(folder / TOWER)
        about = {
            "architecture": model.config.vision_config.architecture,
            "text": self.options.text_model or "a small BERT",
            "loss": {"clip": "CLIP", "siglip": "SigLIP"}[self.options.loss],
            "count": len(data.answers),
            "accuracy": accuracy,
            "labels": len(data.labels),
            "template": data.template,
            "name": self.options.push_to_hub or folder.name,
        }
        write_card(folder, folder.name, USAGE.format(**about), [self.options.loss], "zero-shot-image-classification")

    def check(self, place: str, data: Data) -> None:
        """The pipeline of a folder or repository gives the trained model's scores, and its tower the same embeddings.

        Raises:
            NotTheSame: it does not.
        """
        classify = pipeline("zero-shot-image-classification", place, device="cpu")
        labels = data.labels[:CHECKED_LABELS]
        for image, expected in zip(_some(data.held_out), self.scores(data), strict=True):
            given = classify(image, candidate_labels=labels, hypothesis_template=data.template)
            found = {each["label"]: each["score"] for each in given}
            if found != expected:
                raise NotTheSame(f"{place}: the pipeline gives {found}, the trained model gave {expected}")
        tower = TimmModel.from_pretrained(place, subfolder=TOWER)
        pixels = self.image_processor(_some(data.held_out), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if not torch.equal(tower(pixels), self.module.model.vision_model(pixels).pooler_output):
                raise NotTheSame(f"{place}/{TOWER}: the tower's embeddings are not those of the trained one")

    def _tokens(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt"))


def _some(examples: Examples) -> list[Any]:
    return [examples.images[i] for i in range(min(CHECKED_IMAGES, len(examples.images)))]
