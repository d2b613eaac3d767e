"""What a `from_pretrained` of a tower knows while it runs, refuses, and says."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch.nn as nn
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from .config import OUR_FIELDS, TimmTowerConfig
from .errors import ConfigError, FormatError, WeightsError, shown
from .head import make_code_head, refuse_code
from .skip_init import Budget
from .weights import INDEX_FILE, SINGLE_FILE, read_index


@dataclass
class TowerLoading:
    """What a `from_pretrained` that is under way tells the steps inside it, and what they tell it."""

    place: str  # folder or repository
    download: Mapping[str, Any]  # how its files are found: `revision`, `token`, `cache_dir`, `subfolder`, ...
    trusts: bool  # code of the place may run
    keeps_dtypes: bool  # no dtype was asked for: every tensor keeps its own
    run_code: Callable[..., nn.Module] = make_code_head
    fresh: list[str] = field(default_factory=list)  # keys that are not in the files, and need not be
    left_out: list[str] = field(default_factory=list)  # keys in the files that this model needs no place for
    index: str | None = None  # where its index of weights is, if it has one
    stored: Any = None  # what was read

    def budget(self) -> Budget:
        """What building may cost, by the size of the weight files where these are known."""
        folder = os.path.join(self.place, self.download.get("subfolder") or "")
        if not os.path.isdir(folder):
            return Budget.default()
        return Budget.for_weights(sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".safetensors")))

    def access(self) -> dict[str, Any]:
        """How to reach another repository, where the trunk is stored in one."""
        names = ("token", "cache_dir", "force_download", "local_files_only")
        return {name: self.download[name] for name in names if name in self.download}

    def make_head(self, spec: dict[str, Any]) -> nn.Module:
        """A head that is stored as code; `HeadError` where that is not trusted, or the code fails."""
        if not self.trusts:
            raise refuse_code(spec, repo=self.place, revision=self.download.get("revision"))
        return self.run_code(spec, self.place, **self.download)

    def refuse_damaged_index(self, commit: str | None) -> None:
        """Refuse, by `FormatError`, an index that does not map keys to names of safetensors files.

        Of a `commit`, that of a config which was loaded already, what is cached is not asked for again.
        """
        found = {"_commit_hash": commit, "_raise_exceptions_for_missing_entries": False}
        self.index = cached_file(self.place, INDEX_FILE, **found, **self.download)
        if self.index is not None:
            read_index(Path(self.index))

    def refuse_stale(self, files: Sequence[str]) -> None:
        """Refuse, by `FormatError`, a `model.safetensors` that an index of other files is beside.

        transformers takes the former and does not fetch the latter. `Trainer` makes such repositories: it uploads a
        tower over an older model and takes nothing away.
        """
        if Path(files[0]).name == SINGLE_FILE and self.index is not None:
            raise FormatError(
                f"{self.place}: holds both {SINGLE_FILE} and {INDEX_FILE} of other files; transformers would load the "
                f"first. Remove the stale one; push_to_hub of a tower removes an old {SINGLE_FILE} by itself."
            )


def refuse_changed(stored: TimmTowerConfig, given: TimmTowerConfig, folder: Path) -> None:
    """Refuse, by `ConfigError`, a config that is not the folder's own; only what was frozen may be left out of it."""
    opened = {"frozen"} if given.frozen is None else set()
    odd = [name for name in OUR_FIELDS if getattr(stored, name) != getattr(given, name) and name not in opened]
    if odd:
        changes = ", ".join(
            f"{name}={shown(getattr(given, name))} (stored {shown(getattr(stored, name))})" for name in odd[:4]
        )
        raise ConfigError(
            f"{folder}: a tower is loaded as it was saved; {changes} would make another one of the same weights. Load "
            "it without, change it, and save it. With hf_timm_tower installed from_pretrained takes image_size=..."
        )


def refuse_misfits(name: str, info: Mapping[str, Any], allowed: list[str], left_out: tuple[str, ...]) -> None:
    """Refuse, by `WeightsError`, a model whose weights did not all come from the files, and the other way round."""
    misfits = {
        "missing": sorted(set(info["missing_keys"]) - set(allowed)),
        "unexpected": sorted(key for key in info["unexpected_keys"] if not key.startswith(left_out)),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    lines = [f"{len(keys)} {what}: {', '.join(map(shown, keys[:5]))}" for what, keys in misfits.items() if keys]
    if lines:
        raise WeightsError(
            f"{name}: the weights do not fit, the model is not returned: {'; '.join(lines)}. Where that is wanted, "
            "pass ignore_mismatched_sizes=True"
        )


def warn_of_changes(loading: TowerLoading, info: Mapping[str, Any]) -> None:
    """List fresh weights, and those in the files that the model leaves out."""
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    left_out = sorted({*loading.left_out, *info["unexpected_keys"]})
    found = {"fresh random weights, to be trained": fresh, "weights that this model leaves out": left_out}
    for what, keys in found.items():
        if keys:
            warnings.warn(f"{loading.place}: {what}: {', '.join(shown(key)[1:-1] for key in keys)}", stacklevel=4)


def loading_report(missing_keys: set[str]) -> LoadStateDictInfo:
    """transformers' record of a loading without other events; its fields differ between versions."""
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    info = LoadStateDictInfo(**{each.name: empty.get(each.name, set()) for each in fields(LoadStateDictInfo)})
    info.missing_keys = missing_keys
    return info
