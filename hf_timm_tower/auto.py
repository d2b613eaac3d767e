"""transformers' Auto classes know towers as soon as this package is imported.

`AutoConfig.register` and its kin are called with classes, which would cost every `import hf_timm_tower` the import of
`transformers.modeling_utils`. So they are called when the module that holds the Auto class is imported, by whomever;
at once where that has happened already. Until then this is one entry on `sys.meta_path` that finds nothing by itself.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_AUTO = "transformers.models.auto"
_READER = f"{__package__}.reader"


def _register_config() -> None:
    auto, own = importlib.import_module(f"{_AUTO}.configuration_auto"), importlib.import_module(f"{_READER}.config")
    auto.AutoConfig.register(own.TimmTowerConfig.model_type, own.TimmTowerConfig)
    encoder = importlib.import_module(f"{__package__}.encoder_config").TimmTowerEncoderConfig
    auto.AutoConfig.register(encoder.model_type, encoder)


def _register_models() -> None:
    auto, own = importlib.import_module(f"{_AUTO}.modeling_auto"), importlib.import_module(f"{__package__}.modeling")
    auto.AutoModel.register(own.TimmTowerModel.config_class, own.TimmTowerModel)
    backbone = importlib.import_module(f"{__package__}.backbone").TimmTowerBackbone
    auto.AutoBackbone.register(backbone.config_class, backbone)
    face = own.TimmTowerForImageClassification
    auto.AutoModelForImageClassification.register(face.config_class, face)
    encoder = importlib.import_module(f"{__package__}.encoder").TimmTowerEncoder
    auto.AutoModel.register(encoder.config_class, encoder)


def _register_image_processor() -> None:
    auto = importlib.import_module(f"{_AUTO}.image_processing_auto")
    own = importlib.import_module(f"{_READER}.image_processor")
    config = importlib.import_module(f"{_READER}.config").TimmTowerConfig
    # One class for both backends: it is exact in either environment.
    classes = dict.fromkeys(("pil", "torchvision"), own.TimmTowerImageProcessor)
    auto.AutoImageProcessor.register(config, image_processor_classes=classes)


@dataclass(frozen=True)
class _Registration:
    """What to call once a module is there.

    Attributes:
        when: The module that holds the Auto class.
        needs: Modules that the call imports: where one is half imported, the call waits for its end.
        call: Imports our classes and registers them.
    """

    when: str
    needs: tuple[str, ...]
    call: Callable[[], None]


_PENDING = [
    _Registration(
        f"{_AUTO}.configuration_auto",
        ("transformers.configuration_utils", f"{_READER}.config", f"{__package__}.encoder_config"),
        _register_config,
    ),
    _Registration(
        f"{_AUTO}.modeling_auto",
        ("transformers.modeling_utils", f"{_READER}.config", f"{__package__}.modeling", f"{__package__}.encoder"),
        _register_models,
    ),
    _Registration(
        f"{_AUTO}.image_processing_auto",
        ("transformers.image_processing_utils", f"{_READER}.config", f"{_READER}.image_processor"),
        _register_image_processor,
    ),
]  # fmt: skip


class _Watch(MetaPathFinder):
    """Leaves finding modules to the others, and notices when one of those that count has been imported."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        names = {name for each in _PENDING for name in (each.when, *each.needs)}
        if fullname not in names or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register_ready(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_ready(finished: str | None = None) -> None:
    """Make every registration whose modules are there, or can be imported now.

    Args:
        finished: A module whose code has just run to its end.
    """
    for each in list(_PENDING):
        waits = any(_is_half_imported(name) and name != finished for name in (each.when, *each.needs))
        if each.when in sys.modules and not waits and each in _PENDING:
            _PENDING.remove(each)
            each.call()


def _is_half_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def register() -> None:
    """Make the Auto classes know towers, now or when they are imported. Calling it again changes nothing."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
        _register_ready()
