"""The part of a model card that shows how to load the tower: Python that runs as it stands."""

import json
import re

from ..reader.config import TimmTowerConfig

PIPELINE_TAG = "image-feature-extraction"
CLASSIFICATION_TAG = "image-classification"

_CLASSIFIER = "TimmTowerForImageClassification"

_SNIPPET = re.compile(r"^<!-- snippet: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(card: str) -> dict[str, str]:
    """The Python of a card by name: `package`, `transformers`, `pipeline`, `remote_code`; those that it has.

    A classifier's card has `embedding` too.
    """
    return {found[1]: found[2] for found in _SNIPPET.finditer(card.replace("\r\n", "\n"))}


def use_section(
    config: TimmTowerConfig, repo_id: str | None, include_code: bool, classifies: bool = False
) -> str:
    """How to load a tower with each library that can.

    Args:
        config: A completed config, with the head in its stored form.
        repo_id: The repository or folder to load.
        include_code: Whether transformers can load the tower without this package.
        classifies: Whether the tower has a classifier on top.
    """
    head = config.head or {}
    registered = head.get("form") == "registered"
    with_package = _with_package(config, repo_id) if classifies else _package(config, repo_id)
    parts = ["## Use", "With `hf_timm_tower`:", _snippet("package", with_package)]
    if config.tower_class is None:  # transformers would build a plain tower
        with_transformers = _labelled if classifies else _transformers
        parts += [
            "With `transformers`, this package imported:",
            _snippet("transformers", with_transformers(config, repo_id, imported=True)),
        ]
        if config.in_chans == 3:  # the pipeline reads every image as RGB
            as_pipeline = _labelling if classifies else _pipeline
            parts += ["As a pipeline:", _snippet("pipeline", as_pipeline(config, repo_id))]
        if include_code and not registered:
            parts += [
                "With `transformers` and `timm` alone. `trust_remote_code=True` runs the Python files of this "
                "repository: read them first.",
                _snippet("remote_code", with_transformers(config, repo_id, imported=False)),
            ]
        if classifies:
            parts += [
                "The tower without its classifier, for embeddings (a warning says that the classifier is left out):",
                _snippet("embedding", _package(config, repo_id)),
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
    trust = _trust(config) if imported else ", trust_remote_code=True"
    return [
        *(["import hf_timm_tower  # makes the tower known to transformers"] if imported else []),
        *_inputs(config, repo_id, "transformers", "AutoModel", "AutoImageProcessor", trust),
        "with torch.no_grad():",
        f"    embedding = model(**inputs).pooler_output{_shape(config)}",
    ]


def _with_package(config: TimmTowerConfig, repo_id: str | None) -> list[str]:
    lines = _inputs(config, repo_id, "hf_timm_tower", _CLASSIFIER, "TimmTowerImageProcessor", _trust(config))
    return [*lines, *_answer(config)]


def _labelled(config: TimmTowerConfig, repo_id: str | None, imported: bool) -> list[str]:
    trust = _trust(config) if imported else ", trust_remote_code=True"
    return [
        *(["import hf_timm_tower  # makes the tower known to transformers"] if imported else []),
        *_inputs(config, repo_id, "transformers", "AutoModelForImageClassification", "AutoImageProcessor", trust),
        *_answer(config),
    ]


def _inputs(
    config: TimmTowerConfig, repo_id: str | None, package: str, model: str, processor: str, trust: str
) -> list[str]:
    """A model, and an image as it takes it."""
    height, width = image_size(config)
    picture = config.in_chans == 3
    names = sorted([model, processor]) if picture else [model]
    return [
        "import torch",
        *(["from PIL import Image"] if picture else []),
        f"from {package} import {', '.join(names)}",
        *_own_module(config),
        "",
        _repo(repo_id),
        f"model = {model}.from_pretrained(repo{trust})  # in eval mode",
        *(
            [
                f"processor = {processor}.from_pretrained(repo{trust})",
                _image(config),
                'inputs = processor(image, return_tensors="pt")',
            ]
            if picture
            else [f'inputs = {{"pixel_values": torch.zeros(1, {config.in_chans}, {height}, {width})}}  # yours']
        ),
    ]


def _answer(config: TimmTowerConfig) -> list[str]:
    """What a classifier's numbers mean, for its kind of problem."""
    lines = ["with torch.no_grad():", f"    logits = model(**inputs).logits  # [1, {config.num_labels}]"]
    if _is_regression(config):
        return [*lines, "values = logits[0].tolist()"]
    if config.problem_type == "multi_label_classification":
        scores = "logits.sigmoid()[0].tolist()"
        return [*lines, f"scores = dict(zip(model.config.id2label.values(), {scores}))  # each from 0 to 1"]
    return [*lines, "label = model.config.id2label[int(logits.argmax())]"]


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


def _is_regression(config: TimmTowerConfig) -> bool:
    """As transformers' loss has it: one label without a word about the problem is a number to be predicted."""
    return config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)


def _labelling(config: TimmTowerConfig, repo_id: str | None) -> list[str]:
    # Older transformers, and all where problem_type is not set, squash a lone number into 0 to 1.
    plain = ', function_to_apply="none"' if _is_regression(config) else ""
    return [
        "import hf_timm_tower",
        "from PIL import Image",
        "from transformers import pipeline",
        *_own_module(config),
        "",
        _repo(repo_id),
        f'classify = pipeline("{CLASSIFICATION_TAG}", model=repo{plain}{_trust(config)})',
        _image(config),
        "answers = classify(image)  # label and score of the most likely ones",
    ]


def _shape(config: TimmTowerConfig) -> str:
    pooled = config.head is None and (config.layout == "NC" or config.pool in ("token_avg", "abs_attn", "rot_attn"))
    return f"  # [1, {config.embed_dim}]" if pooled and config.embed_dim else ""
