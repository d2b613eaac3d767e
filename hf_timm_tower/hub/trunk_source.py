"""A trunk whose weights are stored in another repository: pinned by commit and digest, fetched when a tower is loaded.

For foundation models under a licence that lets a head be shared and the trunk not. `config.trunk_source` holds::

    {"repo_id": "org/name", "commit": "<40 hex digits>", "layout": "tower" | "timm",
     "files": {"model.safetensors": "<SHA-256>"}, "unused": ["fc.weight", "fc.bias"]}

`layout` says whose keys the files have: a tower's (`trunk.*`, and a head that is left out) or timm's own. `unused` are
keys of timm's layout that the trunk has no place for (its classifier), so that nothing is left out by chance.
"""

import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch.nn as nn
from torch import Tensor

from ..files.names import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from ..files.open_folder import OpenFolder, read_json
from ..files.ties import same_bits
from ..reader.config import TimmTowerConfig
from ..reader.errors import ConfigError, FolderError, FormatError, HubError, WeightsError, shown
from ..reader.freezing import keeps_statistics
from ..reader.weights import TrunkSource, check_index, parse_trunk_source
from .download import Access, download_files, file_sha256
from .identify import identify

_PREFIX = "trunk."
_REMEDY = (
    "Pass trunk=False to store the trunk with the head, where its terms allow that (where another library saves, as "
    "Trainer does, set config.trunk_source = None); or push with trunk='org/name' of a repository that holds it as is."
)


def read_trunk(source: TrunkSource, access: Access) -> dict[str, Tensor]:
    """Fetch a trunk's weights and check them against their digests.

    Returns:
        `trunk.*` -> tensor on mapped memory.

    Raises:
        HubError: the repository may not be read, is gone, or the network is off.
        WeightsError: it holds other weights than those that were pinned.
    """
    try:
        root = download_files(source.repo_id, source.files, source.commit, access)
    except HubError as error:
        raise HubError(
            f"only the head is stored here; its trunk is stored in {source.repo_id} at commit {source.commit}, and "
            f"could not be fetched: {error}"
        ) from error
    return _read(root, source)


def _read(root: Path, source: TrunkSource) -> dict[str, Tensor]:
    where = f"the trunk in {source.repo_id} at commit {source.commit}"
    tensors: dict[str, Tensor] = {}
    with OpenFolder(root) as folder:
        for name, digest in source.files.items():
            if not folder.has(name):
                raise WeightsError(f"{where}: {name} is gone; the head was trained on it and cannot be used without")
            if _digest(root / name) != digest:
                raise WeightsError(
                    f"{where}: {name} has SHA-256 {_digest(root / name)}, the head was published for {digest}: it is "
                    "another trunk, and the embedding would be another one"
                )
            tensors.update(folder.read_tensors(name))
    return source.named(tensors)


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes, computed once in a process for a file that nobody touched since.

    The name of a blob in the Hub's cache is no proof: a bad disk or another program may have changed it.
    """
    blob = os.path.realpath(path)
    status = os.stat(blob)
    return _digest_of(blob, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=1024)
def _digest_of(path: str, *identity: int) -> str:
    return file_sha256(Path(path))


def find_trunk(place: str, state: Mapping[str, Tensor], access: Access) -> TrunkSource:
    """Pin the trunk of a public tower or a timm repository as the trunk of a tower.

    Args:
        place: `org/name` or `org/name@revision`.
        state: The tower's state dict: its `trunk.*` must have the very bits of that repository.
        access: To read it with.

    Raises:
        HubError: it cannot be read.
        ConfigError: it holds neither a tower with weights of its own nor a timm model.
        WeightsError: its trunk is not this tower's, bit for bit.
    """
    repo_id, _, revision = place.partition("@")
    root = download_files(repo_id, [CONFIG_NAME, INDEX_NAME], revision or None, access)
    config = read_json(root / CONFIG_NAME) if (root / CONFIG_NAME).exists() else {}
    layout: Literal["tower", "timm"]
    names = [SINGLE_NAME]
    if config.get("model_type") == TimmTowerConfig.model_type:
        if config.get("trunk_source") is not None:
            raise ConfigError(f"trunk={place!r}: holds a head only; name the repository that its trunk is stored in")
        layout = "tower"
        if (root / INDEX_NAME).exists():
            weight_map, _ = check_index(read_json(root / INDEX_NAME), f"{repo_id}: {INDEX_NAME}")
            names = sorted({name for key, name in weight_map.items() if key.startswith(_PREFIX)})
    elif "architecture" in config:
        layout = "timm"
    else:
        raise ConfigError(
            f"trunk={place!r}: holds neither a tower nor a timm model. {identify((), config, repo_id)}".rstrip()
        )
    commit = root.name
    root = download_files(repo_id, names, commit, access)
    if lacking := [name for name in names if not (root / name).exists()]:
        raise FolderError(f"trunk={place!r}: {', '.join(lacking)} is missing; only safetensors files are read")
    source = TrunkSource(repo_id, commit, layout, {name: _digest(root / name) for name in names})
    theirs = _read(root, source)
    ours = {key: tensor for key, tensor in state.items() if key.startswith(_PREFIX)}
    _require_equal(ours, theirs, f"trunk={place!r} (commit {commit})")
    spare = sorted(key.removeprefix(_PREFIX) for key in theirs.keys() - ours.keys())
    return TrunkSource(repo_id, commit, layout, source.files, tuple(spare) if layout == "timm" else ())


def kept_trunk_source(config: TimmTowerConfig, state: Mapping[str, Tensor], access: Access) -> TrunkSource | None:
    """Where a tower's trunk stays when the tower is saved or pushed; None for one that was loaded with its own trunk.

    A head is published without its trunk where the trunk's terms forbid to publish that: a push must not do it
    unasked, nor a save into a folder, which is what `Trainer` and `upload_folder` publish.

    Args:
        config: Of the tower.
        state: Its state dict.
        access: To read the trunk's repository with.

    Raises:
        HubError: that repository cannot be read.
        WeightsError: the trunk is no longer the one that is stored there, bit for bit.
    """
    if config.trunk_source is None:
        return None
    source = parse_trunk_source(config.trunk_source)
    where = f"the trunk in {source.repo_id} at commit {source.commit}, which this tower was loaded with,"
    try:
        _require_equal({key: state[key] for key in state if key.startswith(_PREFIX)}, read_trunk(source, access), where)
    except (HubError, WeightsError) as error:
        raise type(error)(f"{error} Nothing was saved or pushed. {_REMEDY}") from error
    return source


def warn_of_training(source: Mapping[str, object], trunk: nn.Module) -> None:
    """Say before hours of training that a trunk which is stored elsewhere moves, and will be in no save unasked."""
    if not trunk.training or not _moves(trunk):
        return
    warnings.warn(
        f"the trunk of this tower is stored in {shown(source.get('repo_id'))}, and will be another one "
        f"after training: saves will be refused. lock(freeze_bn_stats=True) keeps it as it is. {_REMEDY}",
        stacklevel=4,
    )


def _moves(trunk: nn.Module) -> bool:
    return any(each.requires_grad for each in trunk.parameters()) or any(
        module.training and keeps_statistics(module) for module in trunk.modules()
    )


def refuse_as_part(config: TimmTowerConfig) -> None:
    """Refuse to put a tower into another model, which transformers saves and pushes whole without asking the tower.

    Raises:
        WeightsError: its trunk is stored in another repository.
    """
    if config.trunk_source is not None:
        raise WeightsError(
            f"the trunk of this tower is stored in {shown(config.trunk_source.get('repo_id'))}; in another model "
            "transformers saves and pushes it whole, with that model's own weights. Where its terms allow that, save "
            "the tower with its trunk first, by TimmModel.from_pretrained(...).save_pretrained(folder, trunk=False), "
            "and take it from that folder; or set config.trunk_source = None before it becomes a part."
        )


def _require_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    if lacking := sorted(ours.keys() - theirs.keys()):
        raise WeightsError(
            f"{where} lacks {len(lacking)} weights of this tower's trunk ({shown(lacking[:4])}): it is another "
            "architecture, or its files have another layout of keys."
        )
    other = [key for key, tensor in ours.items() if not same_bits(tensor.detach().cpu(), theirs[key])]
    if other:
        raise WeightsError(
            f"{where} is not this tower's trunk: {len(other)} of {len(ours)} weights differ ({shown(other[:4])}). "
            "The trunk was trained, resized or cast since."
        )


def is_separable(ties: tuple[tuple[str, ...], ...]) -> bool:
    """Whether no weight of the head is one with a weight of the trunk."""
    return all(len({key.startswith(_PREFIX) for key in group}) == 1 for group in ties)


def merged(head: Mapping[str, Tensor], trunk: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights of a head and of its trunk as one tower's.

    Raises:
        FormatError: the head's files hold trunk weights too.
    """
    if both := sorted(key for key in head if key.startswith(_PREFIX)):
        raise FormatError(f"{where}: by trunk_source the trunk is elsewhere, yet the files hold {shown(both[0])}")
    return {**head, **trunk}
