"""The part of a model card that shows how to load the tower: Python that runs as it stands."""

import json
import re

from .config import TimmTowerConfig

PIPELINE_TAG = "image-feature-extraction"

_SNIPPET = re.compile(r"^<!-- snippet: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(card: str) -> dict[str, str]:
    """The Python of a card by name: `package`, `transformers`, `pipeline`, `remote_code`; those that it has."""
    return {found[1]: found[2] for found in _SNIPPET.finditer(card.replace("\r\n", "\n"))}


def use_section(config: TimmTowerConfig, repo_id: str | None, include_code: bool) -> str:
    """How to load a tower with each library that can.

    Args:
        config: A completed config, with the head in its stored form.
        repo_id: The repository or folder to load.
        include_code: Whether transformers can load the tower without this package.
    """
    head = config.head or {}
    registered = head.get("form") == "registered"
    parts = ["## Use", "With `hf_timm_tower`:", _snippet("package", _package(config, repo_id))]
    if config.tower_class is None:  # transformers would build a plain tower
        parts += [
            "With `transformers`, this package imported:",
            _snippet("transformers", _transformers(config, repo_id, imported=True)),
        ]
        if config.in_chans == 3:  # the pipeline reads every image as RGB
            parts += ["As a pipeline:", _snippet("pipeline", _pipeline(config, repo_id))]
        if include_code and not registered:
            parts += [
                "With `transformers` and `timm` alone. `trust_remote_code=True` runs the Python files of this "
                "repository: read them first.",
                _snippet("remote_code", _transformers(config, repo_id, imported=False)),
            ]
    return "\n\n".join(parts)


def image_size(config: TimmTowerConfig) -> list[int]:
    """Height and width in pixels."""
    size = config.image_size
    return [size, size] if isinstance(size, int) else list(size or (0, 0))


def _snippet(name: str, lines: list[str]) -> str:
    return "\n".join([f"<!-- snippet: {name} -->", "```python", *lines, "```"])


def _repo(repo_id: str | None) -> str:
    if repo_id is None:
        return 'repo = "path/to/this/folder"'
    literal = json.dumps(repo_id) if repo_id.isascii() else ascii(repo_id)
    return f"repo = {literal}".replace("<", "\\x3c")  # no mark of a comment inside a fence


def _trust(config: TimmTowerConfig) -> str:
    return ", trust_remote_code=True" if (config.head or {}).get("form") == "code" else ""


def _own_module(config: TimmTowerConfig) -> list[str]:
    head = config.head or {}
    if head.get("form") == "registered":
        return [f"# first import the module with @register_head({json.dumps(str(head.get('name')))})"]
    return []


def _image(config: TimmTowerConfig) -> str:
    mode = "RGB" if config.in_chans == 3 else "L"
    return f'image = Image.new("{mode}", (640, 480))  # yours: Image.open("...").convert("{mode}")'


def _package(config: TimmTowerConfig, repo_id: str | None) -> list[str]:
    height, width = image_size(config)
    cls = config.tower_class if str(config.tower_class).isidentifier() and config.tower_class else "TimmModel"
    picture = config.in_chans in (1, 3)
    return [
        "import torch",
        *(["from PIL import Image"] if picture else []),
        f"from {'hf_timm_tower' if cls == 'TimmModel' else 'your_module'} import {cls}",
        *_own_module(config),
        "",
        _repo(repo_id),
        f"tower = {cls}.from_pretrained(repo{_trust(config)})  # in eval mode",
        *(
            [_image(config), "pixels = tower.transform()(image).unsqueeze(0)"]
            if picture
            else [f"pixels = torch.zeros(1, {config.in_chans}, {height}, {width})  # yours, normalised"]
        ),
        "with torch.no_grad():",
        f"    embedding = tower(pixels){_shape(config)}",
    ]


def _transformers(config: TimmTowerConfig, repo_id: str | None, imported: bool) -> list[str]:
    height, width = image_size(config)
    picture = config.in_chans == 3
    trust = _trust(config) if imported else ", trust_remote_code=True"
    names = "AutoImageProcessor, AutoModel" if picture else "AutoModel"
    return [
        *(["import hf_timm_tower  # makes the tower known to transformers"] if imported else []),
        "import torch",
        *(["from PIL import Image"] if picture else []),
        f"from transformers import {names}",
        *_own_module(config),
        "",
        _repo(repo_id),
        f"model = AutoModel.from_pretrained(repo{trust})",
        *(
            [
                f"processor = AutoImageProcessor.from_pretrained(repo{trust})",
                _image(config),
                'inputs = processor(image, return_tensors="pt")',
            ]
            if picture
            else [f'inputs = {{"pixel_values": torch.zeros(1, {config.in_chans}, {height}, {width})}}  # yours']
        ),
        "with torch.no_grad():",
        f"    embedding = model(**inputs).pooler_output{_shape(config)}",
    ]


def _pipeline(config: TimmTowerConfig, repo_id: str | None) -> list[str]:
    return [
        "import hf_timm_tower",
        "from PIL import Image",
        "from transformers import pipeline",
        *_own_module(config),
        "",
        _repo(repo_id),
        f'extract = pipeline("{PIPELINE_TAG}", model=repo, pool=True{_trust(config)})  # pool: the embedding',
        _image(config),
        "embedding = extract(image)[0]  # numbers in a list",
    ]


def _shape(config: TimmTowerConfig) -> str:
    pooled = config.head is None and (config.layout == "NC" or config.pool in ("token_avg", "abs_attn", "rot_attn"))
    return f"  # [1, {config.embed_dim}]" if pooled and config.embed_dim else ""
