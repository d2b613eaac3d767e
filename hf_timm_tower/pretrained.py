"""What the transformers models of this package have beside the reader's: strict reading, saving and pushing.

The files, the card and the commit are those of `TimmModel`.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from transformers import PreTrainedModel
from typing_extensions import Self

from .build import build_for_transformers
from .files.disk import scratch_folder
from .files.fingerprint import Verification
from .hub.audit import audited_config, folder_errors
from .hub.card import CardOptions, as_tags
from .hub.download import Access
from .hub.push import COMMIT_MESSAGE, PushOptions, default_repo_id, push_folder
from .hub.trunk_source import kept_trunk_source, warn_of_training
from .input_size import set_input_size, with_stored_size
from .interop.timm_face import TimmFace
from .load import check_given_head, load_bare, make_code_head, read_tower, refuse_meta, verify
from .reader.config import TimmTowerConfig, check_size
from .reader.errors import ArgumentError, ConfigError, ExportError, WeightsError
from .reader.loading import TowerLoading
from .reader.pretrained import MODEL_TAGS, TimmTowerPreTrainedModel
from .reader.tower import Tower
from .reader.weights import StoredTower, TrunkSource
from .save import Saved, SaveOptions, save_tower, storable_config, with_weights
from .training.freezing import describe_frozen, note_fixed

_PUSH_OPTIONS = {"allow_patterns", "commit_description", "commit_message", "create_pr", "delete_patterns"}
_PUSH_OPTIONS |= {"ignore_patterns", "private", "revision"}


class SavesTower(TimmFace, TimmTowerPreTrainedModel):  # type: ignore[no-untyped-call]
    """What the transformers models of this package have beside the reader's: strict reading, saving, pushing."""

    def __init__(
        self, config: TimmTowerConfig, _loading: TowerLoading | None = None, _parts: Tower | None = None, **unknown: Any
    ) -> None:
        if _parts is not None:  # built already: see `from_tower`
            vars(self)["_build"] = lambda *_: _parts
        super().__init__(config, _loading, **unknown)
        self._fingerprint: dict[str, Any] | None = None
        vars(self).pop("_build", None)
        note_fixed(self)

    @classmethod
    def _on(cls, parts: Tower) -> Self:
        model = cls(parts.config, _parts=parts)
        model.training = parts.training
        return model

    @staticmethod
    def _build(config: TimmTowerConfig, with_classifier: bool, make_head: Any) -> Tower:
        return build_for_transformers(config, with_classifier, make_head)

    _make_code_head = staticmethod(make_code_head)

    def __prepare_scriptable__(self) -> nn.Module:
        """Asked by `torch.jit.script`.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            f"{type(self).__name__}: TorchScript, which torch deprecates, cannot read transformers' models: use "
            "interop.torch_export or interop.onnx, torch.jit.trace, or script TimmModel.from_tower(model)"
        )

    @staticmethod
    def _read(files: Sequence[str], loading: TowerLoading) -> StoredTower:
        return read_tower(Path(files[0]).parent, Access(**loading.access()))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: Any = None,
        image_size: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a tower from a folder or a repository, in eval mode; reads what `TimmModel.from_pretrained` reads.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's id.
            config: A config that was loaded already, or where to load it from. With another `image_size` than the
                stored one it asks for that size.
            image_size: Change the input size after loading, as `set_input_size`; positions are resampled.
            kwargs: As the reader's `TimmTowerPreTrainedModel.from_pretrained`: `dtype`, `frozen`,
                `ignore_mismatched_sizes`, `output_loading_info`, and all that transformers takes.

        Raises:
            WeightsError: weights are missing, unexpected or of another shape.
            ConfigError: the config that was given is not that of the folder, or the trunk cannot take the size.
            TowerError: by what is wrong with the folder.
        """
        refuse_meta(pretrained_model_name_or_path)
        given = isinstance(config, TimmTowerConfig)  # `AutoModel` has read it
        if pretrained_model_name_or_path is not None and (config is None or given):
            adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
            stored = audited_config(pretrained_model_name_or_path, kwargs, adapter)
            if given and stored is not None:
                image_size = config.image_size if image_size is None else image_size
                config = with_stored_size(config, stored.get("image_size"))
        kwargs.setdefault("use_safetensors", True)  # transformers would open a pickle where there is nothing else
        with folder_errors(pretrained_model_name_or_path):
            found = super().from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if image_size is not None:
            model.set_input_size(image_size)
        return found

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that modules with frozen statistics stay in eval mode."""
        super().train(mode)
        if self.config.trunk_source is not None:
            warn_of_training(self.config.trunk_source, self.trunk)
        return self

    def _after_loading(self, loading: TowerLoading) -> None:
        if loading.stored is None or loading.stored.fingerprint is None:
            return
        self._fingerprint = loading.stored.fingerprint
        if (self.config.head or {}).get("form") == "registered" and getattr(self, "hf_quantizer", None) is None:
            check_given_head(self._bare())

    def _bare(self) -> Any:
        bare: Any = Tower(self.config, self.trunk, self.head)
        bare._fingerprint = self._fingerprint
        return bare

    def verify(self) -> Verification:
        """Whether the tower gives the embedding that it was saved with, on this timm, torch and device.

        Raises:
            FolderError: it was neither saved nor loaded yet, or its folder has no fingerprint.
        """
        return verify(self._bare())

    def set_input_size(self, image_size: int | Sequence[int]) -> None:
        """Change the input size as `TimmModel.set_input_size` does, an int or (height, width) in pixels.

        Raises:
            ConfigError: the trunk does not run at this size, or timm cannot build it for this size. The tower is as
                before.
        """
        fixed = getattr(self, "hf_quantizer", None) is not None or any(each.is_meta for each in self.trunk.parameters())
        if fixed and check_size("image_size", image_size) != self.config.image_size:
            raise ConfigError(
                f"image_size={image_size}: the trunk is quantized or offloaded: save the tower at this size first, and "
                "quantize or offload when loading that"
            )
        set_input_size(self, image_size)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        safe_serialization: bool = True,
        *,
        repo_id: str | None = None,
        tags: str | Sequence[str] | None = None,
        license: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        evaluated_on: str | None = None,
        include_code: bool | None = None,
        trunk: Literal[False] | None = None,
        save_function: Any = None,
        **kwargs: Any,
    ) -> None:
        """Save as `TimmModel.save_pretrained` does: the same files, loaded back and compared before they are in place.

        Args:
            save_directory: A folder, existing or not; files in it that are not the tower's are kept, and so is what
                a person wrote into the card.
            is_main_process: False saves nothing: another process does.
            state_dict: The weights, where they had to be gathered from several processes.
            push_to_hub: Push what is saved; a trunk that is stored in another repository stays there and is in neither.
            max_shard_size: Largest weight file, in bytes or as `"5GB"`.
            variant: Refused: a tower has one set of weights.
            token: For pushing.
            save_peft_format: For a model with an adapter, of which only the adapter is saved.
            save_original_format: Of transformers; a tower has one format.
            safe_serialization: True, as older transformers and sentence-transformers pass it; False is refused.
            repo_id: For the card, and where to push; the folder's name by default.
            tags: Further tags for the card, beside those of `add_model_tags`.
            license: For the card; never guessed.
            model_card_kwargs: Further metadata for the card: `base_model`, `datasets`, `language`, ...
            metrics: Name -> figure, for the card's table and its `model-index`.
            evaluated_on: Id of the data set that they were measured on.
            include_code: None: the folder carries its reader, so that it loads where this package is not installed.
                True: also the source of the head, where it cannot be stored in another form. False: no code at all.
            trunk: None: a trunk that is stored in another repository stays there; refused where it is not the same any
                more. False: the folder holds it whole.
            save_function: Taken and not called: accelerate's scripts pass `accelerator.save`; the files of a tower are
                written by this package, which loads them back and compares.
            kwargs: For `push_to_hub`.

        Raises:
            HeadError: the head cannot be stored in any form; nothing was written.
            FolderError: the folder cannot be written; what was there before is whole.
            WeightsError: the trunk is stored in another repository, and is not that one any more; nothing was written.
            HubError: it was saved, but could not be pushed; or that repository cannot be read.
        """
        options = self._options(
            tags, license, model_card_kwargs, metrics, evaluated_on, include_code, max_shard_size, repo_id
        )
        if getattr(self, "_hf_peft_config_loaded", False):
            _refuse_with_adapter(options)
            if push_to_hub and repo_id is not None:
                kwargs["repo_id"] = repo_id
            stock: Any = PreTrainedModel.save_pretrained
            stock(self, save_directory, is_main_process, state_dict, push_to_hub, token=token,
                  save_peft_format=save_peft_format, **kwargs)  # fmt: skip
            return
        if not safe_serialization:
            raise ArgumentError("safe_serialization=False: a tower is saved as safetensors and never as pickle")
        if (unknown := sorted(set(kwargs) - (_PUSH_OPTIONS if push_to_hub else set()))) or variant is not None:
            raise ArgumentError(f"save_pretrained: {', '.join(unknown) or 'variant'} cannot be honoured")
        if not is_main_process:
            return
        access, weights = Access(token=token), self.state_dict() if state_dict is None else state_dict
        pinned = None if trunk is False else kept_trunk_source(self.config, weights, access)
        saved = self._save(save_directory, options, state_dict, pinned, access)
        if not push_to_hub:
            return
        push = PushOptions(
            commit_message=kwargs.pop("commit_message", None) or COMMIT_MESSAGE,
            branch=kwargs.pop("revision", None),
            token=token,
            **kwargs,
        )
        place = repo_id or default_repo_id(save_directory)
        push_folder(Path(save_directory), place, partial(saved.card, options.cards), saved.names, push)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        tags: str | Sequence[str] | None = None,
        license: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        evaluated_on: str | None = None,
        include_code: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        trunk: Literal[False] | None = None,
    ) -> str:
        """Save the tower, checked as by `save_pretrained`, and push it in one commit, as `TimmModel.push_to_hub` does.

        What the Hub has already is not sent again, files that an earlier tower left go, and of a card that was edited
        on the Hub only the parts between our markers change. Of a model with an adapter, transformers pushes the
        adapter, in its own way.

        Args:
            repo_id: `name` or `org/name`; made where it does not exist.
            commit_message: The commit's first line.
            commit_description: What stands under it.
            private: Of the repository, where this call makes it.
            token: With the right to write; the one that is logged in by default.
            revision: The branch, made where it does not exist; the main one by default.
            create_pr: Open a pull request instead of committing.
            max_shard_size: Largest weight file, in bytes or as `"5GB"`.
            tags: As in `save_pretrained`.
            license: As in `save_pretrained`.
            model_card_kwargs: As in `save_pretrained`.
            metrics: As in `save_pretrained`.
            evaluated_on: As in `save_pretrained`.
            include_code: As in `save_pretrained`.
            allow_patterns: Push only files that match.
            ignore_patterns: Do not push files that match.
            delete_patterns: Delete further files of the repository that match.
            trunk: None: a trunk that is stored in another repository stays there, and only the head is pushed. False:
                the whole tower is pushed.

        Returns:
            The commit's address (the pull request's with `create_pr`).

        Raises:
            HeadError, TowerError: the tower cannot be saved; nothing was sent.
            HubError: the repository cannot be written; nothing was committed.
        """
        options = self._options(tags, license, model_card_kwargs, metrics, evaluated_on, include_code, max_shard_size)
        if getattr(self, "_hf_peft_config_loaded", False):
            _refuse_with_adapter(options, allow_patterns, ignore_patterns, delete_patterns)
            stock: Any = PreTrainedModel.push_to_hub
            return str(
                stock(
                    self,
                    repo_id,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    private=private,
                    token=token,
                    revision=revision,
                    create_pr=create_pr,
                    max_shard_size=max_shard_size,
                    tags=list(as_tags(tags)),
                )
            )
        push = PushOptions(
            commit_message=commit_message or COMMIT_MESSAGE,
            commit_description=commit_description,
            private=private,
            token=token,
            branch=revision,
            create_pr=create_pr,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            delete_patterns=delete_patterns,
        )
        with scratch_folder("hf_timm_tower_push_") as scratch:
            folder = scratch / "tower"
            access = Access(token=token)
            pinned = kept_trunk_source(self.config, self.state_dict(), access) if trunk is None else None
            saved = self._save(folder, options, trunk=pinned, access=access)
            return push_folder(folder, repo_id, partial(saved.card, options.cards), saved.names, push)

    def _options(
        self,
        tags: str | Sequence[str] | None,
        license: str | None,
        more: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None,
        evaluated_on: str | None,
        include_code: bool | None,
        max_shard_size: int | str,
        repo_id: str | None = None,
    ) -> SaveOptions:
        added = [tag for tag in self.model_tags or () if tag not in MODEL_TAGS]
        cards = CardOptions(
            tags=tuple(dict.fromkeys((*added, *as_tags(tags)))),
            license=license,
            more=more or {},
            metrics=metrics,
            evaluated_on=evaluated_on,
            repo_id=repo_id,
        )
        return SaveOptions(cards, include_code, max_shard_size)

    def _save(
        self,
        folder: str | os.PathLike[str],
        options: SaveOptions,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        trunk: TrunkSource | None = None,
        access: Access | None = None,
    ) -> Saved:
        if getattr(self, "hf_quantizer", None) is not None:
            raise WeightsError("a quantized tower is not saved: save it as it was before, and quantize when loading")
        tower: Any = self if state_dict is None else with_weights(self, state_dict)
        proven, known = storable_config(tower, include_code=options.include_code)
        stored = copy.deepcopy(proven.stored)
        stored.frozen = describe_frozen(Tower(self.config, self.trunk, self.head))
        stored.trunk_source = None if trunk is None else trunk.to_json()
        stored.architectures = [type(self).__name__.removeprefix("FSDP")]  # FSDP2 renames the class in place
        stored.dtype = None
        vars(stored).pop("use_cache", None)  # of Trainer, not of the tower
        load = partial(load_bare, trust_head_code=bool(proven.sources), access=access)
        saved = save_tower(tower, stored, folder, load, options, sources=proven.sources, form_is_proven=known)
        self._fingerprint, self._proven = saved.fingerprint, proven
        return saved


def _refuse_with_adapter(options: SaveOptions, *patterns: Any) -> None:
    """An adapter is saved and pushed by transformers, which has no place for these."""
    cards = options.cards
    asked = (cards.license, cards.more or None, cards.metrics or None, cards.evaluated_on, *patterns)
    if any(value is not None for value in asked) or options.include_code is False:
        raise ArgumentError(
            "a model with an adapter: transformers saves and pushes the adapter alone, with its own card; license, "
            "metrics, further metadata, include_code=False and patterns cannot be honoured. Merge the adapter first."
        )
