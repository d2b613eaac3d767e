"""What a `from_pretrained` that is under way knows, and what it refuses or says."""

import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from ..files.fingerprint import compare, run_probe
from ..files.names import INDEX_NAME, SINGLE_NAME
from ..heads.head_code import construct_code, refuse_code
from ..hub.download import Access
from .build import Tower
from .config import OUR_FIELDS, TimmTowerConfig
from .errors import ConfigError, FormatError, HeadError, WeightsError
from .head import code_file
from .trunk import native_size

# Keywords of `from_pretrained` that say how files are found.
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")


@dataclass
class Loading:
    """What a `from_pretrained` that is under way tells the steps inside it, and what they tell it.

    Attributes:
        place: Folder or repository.
        download: How its files are found: `revision`, `token`, `cache_dir`, `subfolder`, ...
        trusts: Code of the place may run.
        budget: Most bytes that building may ask for; None where the folder is not known yet.
        keeps_dtypes: No dtype was asked for: every tensor keeps its own.
        fresh: Keys that are not in the files, and need not be.
        left_out: Keys in the files that this model has no place for, and need not have.
        fingerprint: The folder's.
    """

    place: str
    download: Mapping[str, Any]
    trusts: bool
    budget: int | None
    keeps_dtypes: bool
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    fingerprint: dict[str, Any] | None = None

    def make_head(self, spec: dict[str, Any]) -> nn.Module:
        """A head that is stored as code, where that is trusted.

        Raises:
            HeadError: it is not, or the code fails.
        """
        file = code_file({"head": spec}) or ""
        if not self.trusts:
            raise refuse_code(spec, repo=self.place, revision=self.download.get("revision"), file=file)
        path = Path(cached_file(self.place, file, **self.download) or file)
        return construct_code(spec, path.read_text(encoding="utf-8"), where=str(path))

    def refuse_stale(self, files: list[str]) -> None:
        """Refuse a `model.safetensors` that an index of other files lies beside, as a folder with both is refused.

        transformers takes the former and does not fetch the latter. `Trainer` makes such repositories: it uploads a
        tower over an older model and takes nothing away.

        Raises:
            FormatError: there are both.
        """
        if Path(files[0]).name != SINGLE_NAME:
            return
        if cached_file(self.place, INDEX_NAME, _raise_exceptions_for_missing_entries=False, **self.download):
            raise FormatError(
                f"{self.place}: holds both {SINGLE_NAME} and {INDEX_NAME} of other files; transformers would load the "
                f"first. Remove the stale one; push_to_hub of a tower removes an old {SINGLE_NAME} by itself."
            )

    def access(self) -> Access:
        """How to reach another repository, where the trunk lies in one."""
        names = ("token", "cache_dir", "force_download", "local_files_only")
        return Access(**{name: self.download[name] for name in names if self.download.get(name) is not None})


LOADING: ContextVar[Loading | None] = ContextVar("loading", default=None)


def refuse_changed(stored: TimmTowerConfig, given: TimmTowerConfig, folder: Path) -> None:
    """Refuse a config that is not the folder's own; only what was frozen may be left out of it.

    Raises:
        ConfigError: names the fields.
    """
    opened = {"frozen"} if given.frozen is None else set()
    odd = [name for name in OUR_FIELDS if getattr(stored, name) != getattr(given, name) and name not in opened]
    if odd:
        changes = ", ".join(f"{name}={getattr(given, name)!r} (stored {getattr(stored, name)!r})" for name in odd[:4])
        raise ConfigError(
            f"{folder}: a tower is loaded as it was saved; {changes} would make another one of the same weights. Load "
            "it without, change it (TimmModel.from_pretrained takes image_size=...), and save it."
        )


def refuse_misfits(name: str, info: Mapping[str, Any], allowed: list[str]) -> None:
    """Refuse a model whose weights did not all come from the files, and the other way round.

    Args:
        name: Folder or repository.
        info: transformers' loading info.
        allowed: Keys that may be missing.

    Raises:
        WeightsError: lists them.
    """
    misfits = {
        "missing": sorted(set(info["missing_keys"]) - set(allowed)),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    lines = [f"{len(keys)} {what}: {', '.join(keys[:5])}" for what, keys in misfits.items() if keys]
    if lines:
        raise WeightsError(
            f"{name}: the weights do not fit, the model is not returned: {'; '.join(lines)}. Where that is wanted, "
            "pass ignore_mismatched_sizes=True"
        )


def warn_of_changes(name: str, info: Mapping[str, Any], loading: Loading) -> None:
    """List fresh weights, and those in the files that the model leaves out."""
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    left_out = sorted({*loading.left_out, *info["unexpected_keys"]})
    if fresh:
        warnings.warn(f"{name}: fresh random weights, to be trained: {', '.join(fresh)}", stacklevel=4)
    if left_out:
        warnings.warn(f"{name}: weights in the files that this model leaves out: {', '.join(left_out)}", stacklevel=4)


def loading_report(missing_keys: set[str]) -> LoadStateDictInfo:
    """transformers' record of a loading without other events; its fields differ between versions."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    info = LoadStateDictInfo(**{each.name: empty.get(each.name, set()) for each in fields(LoadStateDictInfo)})
    info.missing_keys = missing_keys
    return info


def check_registered_head(tower: Tower, fingerprint: dict[str, Any]) -> None:
    """Code of this process made the head: the numbers must be those of the save.

    Raises:
        HeadError: they are not.
    """
    size = native_size(tower.config)
    found = compare(fingerprint, tower, run_probe(tower, tower.config.in_chans, size), tower.config.in_chans, size)
    if found.status == "different":
        raise HeadError(
            f"the head registered as {(tower.config.head or {}).get('name')!r} takes the stored weights but gives "
            f"other numbers than when it was saved ({found}). Register the class that the tower was saved with."
        )
