"""timm's own repositories and folders as towers: `config.json` with an architecture, its arguments, and weights.

Two kinds are read: what timm writes (`timm.models.push_to_hf_hub`, `save_for_hf`), and what transformers'
`TimmWrapperModel.save_pretrained` writes. timm itself puts the weights into its model, so that what it does to a
checkpoint (filters, position embeddings of another size, a first convolution for other channels) is done by its own
code; that nothing was left at random is then checked here.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg

from ..files.names import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from ..files.open_folder import OpenFolder
from ..hub.download import Access, download_files
from ..hub.identify import identify
from ..reader.config import ATTENTION_POOLS, TimmTowerConfig, check_architecture, check_size
from ..reader.errors import ConfigError, FolderError, FormatError, WeightsError, one_line, shown
from ..reader.model_args import FROM_TRUNK, check_names, decode, encode, inner
from ..reader.skip_init import Budget, skip_init
from ..reader.trunk import BUILD_ERRORS, has_fixed_size, native_cfg
from ..reader.weights import check_index
from ..trunk_facts import preprocess_from_timm
from .weight_source import open_weights

PICKLE_NAME = "pytorch_model.bin"
HUB_SCHEMES, FOLDER_SCHEME = ("hf-hub:", "hf_hub:"), "local-dir:"

_WRAPPER = "timm_wrapper"
_WRAPPER_PREFIX = "timm_model."
# Where weights lie and how they are read is settled here, and not by the file.
_SOURCE_FIELDS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_CFG_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)} - _SOURCE_FIELDS


@dataclass(frozen=True)
class TimmSource:
    """A timm model in a folder, as its `config.json` describes it.

    Attributes:
        place: Its repository's id or path, for messages.
        architecture: With a pretrained tag where this timm knows the tag.
        model_args: Arguments of `timm.create_model` as JSON; `num_classes` and `global_pool` among them.
        image_size: Height and width in pixels.
        in_chans: Channels of the image.
        pretrained_cfg: timm's, without the fields that say where weights are.
        has_size: The stored arguments say for what size the trunk is built, so that timm is always told one.
        shown_size: Size of the images that timm would show it, where that is another one (dynamic image size).
        weights: Key -> tensor; None where only the config was asked for.
    """

    place: str
    architecture: str
    model_args: dict[str, Any]
    image_size: list[int]
    in_chans: int
    pretrained_cfg: dict[str, Any]
    has_size: bool
    shown_size: list[int] | None
    weights: Mapping[str, torch.Tensor] | None

    @property
    def num_classes(self) -> int:
        """Classes of the stored classifier, 0 where there is none."""
        return int(self.model_args["num_classes"])

    def config(
        self,
        head_fields: Mapping[str, Any],
        *,
        image_size: Any = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> TimmTowerConfig:
        """The config of a tower on this trunk.

        Args:
            head_fields: Fields that say what comes after the trunk, as `arguments.head_fields` gives them.
            image_size: Pixels, an int or (height, width), instead of the stored size; needed where two are stored.
            model_args: Arguments of `timm.create_model` that go over the stored ones, `in_chans` among them.

        Raises:
            ConfigError: arguments that a tower does not take, or two image sizes are stored and none is chosen.
            FormatError: what is stored of preprocessing cannot be read.
        """
        if image_size is None and self.shown_size is not None:
            raise ConfigError(
                f"{self.place}: built for {self.image_size} pixels (model_args.img_size), yet timm would show it images"
                f" of {self.shown_size} (pretrained_cfg.input_size) and resample its position embeddings each time. A "
                f"tower has one size: pass image_size={self.image_size} or image_size={self.shown_size}"
            )
        fields = dict(head_fields)
        args = {**self.model_args, **(model_args or {})}
        if fields.get("proj") is None and fields.get("head") is None:
            # the trunk's own classifier is the projection
            fields["embed_dim"] = fields.get("embed_dim") or self.num_classes or None
            args["num_classes"] = fields["embed_dim"] or 0
            if not args["num_classes"] and fields["pool"] not in ATTENTION_POOLS:
                raise ConfigError(
                    f"{self.place} has no classifier, which proj=None makes the projection: pass another proj; for "
                    "TimmTowerForImageClassification num_labels=... or id2label={0: ..., ...}"
                )
        channels = args.pop("in_chans", self.in_chans)
        try:
            preprocess = preprocess_from_timm(self.pretrained_cfg, channels)
        except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
            raise FormatError(
                f"{self.place}: pretrained_cfg says nothing usable of preprocessing: {one_line(error)}"
            ) from error
        return TimmTowerConfig(
            architecture=self.architecture,
            model_args=args,
            image_size=list(self.image_size) if image_size is None else image_size,
            in_chans=channels,
            preprocess=preprocess,
            classifier="reset",
            **fields,
        )


def is_timm_source(name: object) -> bool:
    """Whether a name is spelled as timm spells a repository or a folder: `hf-hub:org/name`, `local-dir:path`."""
    return isinstance(name, str) and name.lower().startswith((*HUB_SCHEMES, FOLDER_SCHEME))


def open_timm_source(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    access: Access | None = None,
    with_weights: bool = True,
    allow_pickle: bool = False,
) -> TimmSource:
    """Read a timm repository or folder, or a folder of transformers' `TimmWrapperModel`.

    Args:
        source: `org/name`, `hf-hub:org/name`, `hf-hub:org/name@revision`, a folder, or `local-dir:folder`.
        revision: Branch, tag or commit.
        access: Token, cache and so on.
        with_weights: Fetch and read the weights too.
        allow_pickle: Read `pytorch_model.bin` where there is no safetensors file, with `weights_only=True`.

    Raises:
        FolderError: no such folder, or weights are missing (a HubError where it is a repository).
        ConfigError: it holds something else, or an architecture or arguments that a tower does not take.
        FormatError: a damaged file.
    """
    access = access or Access()
    name = os.fspath(source)
    scheme = next((each for each in (*HUB_SCHEMES, FOLDER_SCHEME) if name.lower().startswith(each)), "")
    name = name[len(scheme) :]
    if not name:
        raise ConfigError(f"{os.fspath(source)!r}: expected a repository's id or a folder after {scheme!r}")
    is_folder = scheme == FOLDER_SCHEME or (not scheme and Path(name).is_dir())
    repo_id = None
    if not is_folder:
        repo_id, _, at = name.partition("@")
        if at and revision and at != revision:
            raise ConfigError(f"{name!r} and revision={revision!r} name two revisions")
        root = download_files(repo_id, [CONFIG_NAME], revision or at or None, access)
    else:
        root = Path(name)
    with OpenFolder(root) as folder:
        if not folder.has(CONFIG_NAME):
            seems = identify(os.listdir(root), None, name)
            raise FolderError(f"{name}: {CONFIG_NAME} is missing, so it holds no timm model. {seems}".rstrip())
        described = _describe(folder.read_json(CONFIG_NAME), name)
    weights = None
    if with_weights:
        weights = _read_weights(root, repo_id, access, name, allow_pickle)
        _check_budget(described, weights)
    return dataclasses.replace(described, weights=weights)


def _describe(stored: dict[str, Any], place: str) -> TimmSource:
    where = f"{place}: {CONFIG_NAME}"
    kind = stored.get("model_type")
    name = stored.get("architecture")
    if kind not in (None, _WRAPPER) or not isinstance(name, str):
        raise ConfigError(
            f"{where} describes no timm model (model_type {shown(kind)}, architecture {shown(name)}). "
            f"{identify((), stored, place)}".rstrip()
        )
    # timm's older form has everything at the top level
    cfg = stored.get("pretrained_cfg")
    is_flat = cfg is None and kind != _WRAPPER
    cfg = stored if is_flat else cfg or {}
    args = stored.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(args, dict):
        raise FormatError(f"{where}: pretrained_cfg and model_args must be objects")
    arch, _, tag = name.partition(".")
    check_architecture(arch)
    tag = str(cfg.get("tag") or tag)
    known = tag and f"{arch}.{tag}" in timm.models.get_arch_pretrained_cfgs(arch)
    architecture = f"{arch}.{tag}" if known else arch
    # What is not stored is timm's default where timm wrote the file, and the architecture's own where it is named only.
    base = {} if "pretrained_cfg" in stored or is_flat else native_cfg(architecture)
    found = {key: value for key, value in {**base, **cfg}.items() if key in _CFG_FIELDS and value is not None}
    found.pop("tag", None)
    if "num_classes" in stored:
        found["num_classes"] = stored["num_classes"]
    if kind == _WRAPPER and stored.get("architectures") == ["TimmWrapperModel"]:
        found["num_classes"] = 0  # it builds its trunk without a classifier, whatever the file says
    cfg = PretrainedCfg(**found).to_dict()  # type: ignore[no-untyped-call]
    cfg = {key: value for key, value in cfg.items() if key in _CFG_FIELDS}

    args = {key: encode(value, inner(f"{where}: model_args", key)) for key, value in args.items() if value is not None}
    if args.get("dynamic_img_size") or args.get("strict_img_size") is False or args.get("use_naflex"):
        cfg["fixed_input_size"] = False
    channels, height, width = _input_size(cfg, where)
    size = args.pop("img_size", None)
    shown_size = None
    if size is not None:
        size = check_size(f"{where}: model_args.img_size", size)
        if size != [height, width] and not cfg.get("fixed_input_size"):
            shown_size = [height, width]
        height, width = size
    channels = args.pop("in_chans", channels)
    args.setdefault("num_classes", cfg.get("num_classes") or 0)
    if isinstance(args["num_classes"], bool) or not isinstance(args["num_classes"], int):
        raise FormatError(f"{where}: num_classes={shown(args['num_classes'])}: expected a whole number")
    args["num_classes"] = max(0, args["num_classes"])
    check_names(args, recorded=FROM_TRUNK)
    cfg["architecture"], cfg["input_size"] = arch, (channels, height, width)
    return TimmSource(place, architecture, args, [height, width], channels, cfg, size is not None, shown_size, None)


def _input_size(cfg: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    size = cfg["input_size"]
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(isinstance(side, int) for side in size):
        raise FormatError(f"{where}: input_size={shown(size)}: expected (channels, height, width)")
    return size[0], size[1], size[2]


def _read_weights(
    root: Path, repo_id: str | None, access: Access, place: str, allow_pickle: bool
) -> dict[str, torch.Tensor]:
    def fetch(*names: str) -> Path:
        return root if repo_id is None else download_files(repo_id, names, root.name, access)

    # one commit: the folder of a snapshot is named by it
    with OpenFolder(fetch(SINGLE_NAME, INDEX_NAME)) as folder:
        if folder.has(SINGLE_NAME):
            names = [SINGLE_NAME]
        elif folder.has(INDEX_NAME):
            weight_map, _ = check_index(folder.read_json(INDEX_NAME), f"{place}: {INDEX_NAME}")
            names = sorted(set(weight_map.values()))
        else:
            names = []
    if not names:
        if not allow_pickle:
            raise FolderError(
                f"{place}: {SINGLE_NAME} is missing. If it holds {PICKLE_NAME}, a pickle, which can run code when it "
                "is read: pass allow_pickle=True to have torch read it with weights_only=True, or convert it."
            )
        return _plain_keys(_read_pickle(fetch(PICKLE_NAME) / PICKLE_NAME, place))
    tensors: dict[str, torch.Tensor] = {}
    with OpenFolder(fetch(*names)) as folder:
        for name in names:
            tensors.update(folder.read_tensors(name))
    if not tensors:
        raise FormatError(f"{place}: its weight files hold no tensors")
    return _plain_keys(tensors)


def _read_pickle(path: Path, place: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FolderError(f"{place}: neither {SINGLE_NAME} nor {PICKLE_NAME} is there")
    found = open_weights(path, allow_pickle=True)
    # as timm looks into a checkpoint of its own training script: averaged weights first
    for prefix in ("state_dict_ema.", "model_ema.", "state_dict.", "model."):
        if keys := [key for key in found.specs if key.startswith(prefix)]:
            return {key.removeprefix(prefix): tensor for key, tensor in found.read(keys).items()}
    return found.read(found.specs)


def _plain_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix that transformers' wrapper has in memory, and in some of its files."""
    if tensors and all(key.startswith(_WRAPPER_PREFIX) for key in tensors):
        return {key.removeprefix(_WRAPPER_PREFIX): value for key, value in tensors.items()}
    return tensors


def _check_budget(source: TimmSource, weights: Mapping[str, torch.Tensor]) -> None:
    held = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    with skip_init(Budget.for_weights(held)):
        create_model(source, source.image_size, source.in_chans, source.model_args)


class _CfgWithWeights(PretrainedCfg):
    """Hands the weights through as they are, where the base class would copy them."""

    def to_dict(self, remove_source: bool = False, remove_null: bool = True) -> dict[str, Any]:
        """Field -> value."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        keep = ("pool_size", "first_conv", "classifier")
        return {key: value for key, value in fields.items() if value is not None or key in keep}


def create_model(
    source: TimmSource,
    image_size: list[int],
    in_chans: int,
    model_args: Mapping[str, Any],
    with_weights: bool = False,
) -> nn.Module:
    """timm's own model, with its classifier.

    Args:
        source: Opened, with its weights where they are wanted.
        image_size: Height and width in pixels.
        in_chans: Channels of the image.
        model_args: As the config stores them.
        with_weights: Have timm load the source's weights into it.

    Raises:
        ConfigError: timm cannot build it.
        WeightsError: the weights do not fit.
    """
    kwargs = {key: decode(value, f"model_args.{key}") for key, value in model_args.items()}
    cfg = {**source.pretrained_cfg, "num_classes": source.num_classes}
    if source.has_size or has_fixed_size(native_cfg(source.architecture.partition(".")[0]), kwargs):
        kwargs["img_size"] = tuple(image_size)
    kwargs["in_chans"] = in_chans
    if with_weights:
        stored = {key: decode(value, f"model_args.{key}") for key, value in source.model_args.items()}
        stored |= {"in_chans": source.in_chans} | ({"img_size": tuple(source.image_size)} if source.has_size else {})
        kwargs["pretrained_model_args"] = stored
        # a dict of its own: timm's filters change what they are given
        kwargs["pretrained_cfg"] = _CfgWithWeights(**cfg, state_dict=dict(source.weights or {}))
    else:
        kwargs["pretrained_cfg"] = PretrainedCfg(**cfg)
    try:
        model = timm.create_model(source.architecture.partition(".")[0], pretrained=with_weights, **kwargs)
    except BUILD_ERRORS as error:
        raise _not_built(source, error, with_weights) from error
    # timm keeps what it was given, weights and all
    cfg = {key: value for key, value in vars(model)["pretrained_cfg"].items() if key != "state_dict"}
    vars(model).update(pretrained_cfg=cfg, default_cfg=dict(cfg))
    return model


def _not_built(source: TimmSource, error: Exception, with_weights: bool) -> ConfigError | WeightsError:
    if isinstance(error, ConfigError):
        return error
    text = " ".join(str(error).split())[:500]
    if with_weights:
        return WeightsError(f"{source.place}: its weights do not fit {source.architecture}: {text}")
    return ConfigError(f"{source.place}: timm cannot build {source.architecture} with {source.model_args}: {text}")
