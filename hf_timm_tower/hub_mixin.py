"""Saving, loading and pushing of a tower: the methods of `PyTorchModelHubMixin`, made strict."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from typing_extensions import Self

from .build import Rates
from .files.disk import scratch_folder
from .files.fingerprint import Verification, weight_digests
from .heads.registry import CustomHead
from .hub.card import CardOptions, as_tags, tower_facts
from .hub.download import Access
from .hub.fetch import commit_of, fetch_tower
from .hub.push import COMMIT_MESSAGE, PushOptions, default_repo_id, push_folder
from .hub.trunk_source import find_trunk, kept_trunk_source
from .load import check_device, load_tower, verify
from .reader.config import TimmTowerConfig
from .reader.errors import ArgumentError, TowerError
from .reader.weights import TrunkSource, floating_dtype
from .save import Saved, SaveOptions, save_tower, storable_config, with_weights
from .subclassing import OVERRIDABLE, added_arguments, overrides


class TowerHubMixin(nn.Module, PyTorchModelHubMixin):
    """What a tower can do with folders and repositories. `TimmModel` is the only class to inherit from it.

    Attributes:
        config: The tower's config.
        trunk: The timm model.
        head: Pool, projection or custom head.
    """

    config: TimmTowerConfig
    trunk: nn.Module
    head: nn.Module
    _fingerprint: dict[str, Any] | None
    _origin: dict[str, str | None] | None = None  # where it was loaded from, and which commit

    def set_input_size(self, image_size: int | Sequence[int]) -> None:
        """Change the input size, an int or (height, width), in pixels."""
        raise NotImplementedError

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: dict[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        tags: str | Sequence[str] = (),
        license: str | None = None,
        metrics: Mapping[str, float] | None = None,
        evaluated_on: str | None = None,
        include_code: bool | None = None,
        trunk: Literal[False] | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Any = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Save config, weights, fingerprint and card, load them back, compare, and put them in place at once.

        Args:
            save_directory: A folder, existing or not; files in it that are not the tower's are kept, and so is what
                a person wrote into the card.
            config: Of the mixin; the tower's own config is saved, another is refused.
            repo_id: For the card, and where to push; the folder's name by default.
            push_to_hub: Push what is saved; a trunk that is stored in another repository stays there and is in neither.
            model_card_kwargs: Further metadata for the card: `base_model`, `datasets`, `language`, ...; `metrics` as
                name -> figure, with `evaluated_on` (a data set's id) and `evaluated_task`.
            tags: Further tags for the card.
            license: For the card; never guessed.
            metrics: Name -> figure, for the card's table and its `model-index`.
            evaluated_on: Id of the data set that they were measured on.
            include_code: None: the folder carries its reader, so that it loads where this package is not installed.
                True: also the source of the head, where it cannot be stored in another form. False: no code at all.
            trunk: None: a trunk that is stored in another repository stays there, and what loads the folder fetches it
                from there; refused where it is not the same any more, bit for bit. False: the folder holds it whole.
            max_shard_size: Largest weight file, in bytes or as `"5GB"`.
            is_main_process: False saves nothing: another process does.
            state_dict: The weights, where they had to be gathered from several processes.
            save_function: Taken and not called: accelerate's scripts pass `accelerator.save`; the files of a tower are
                written by this package, which loads them back and compares.
            push_to_hub_kwargs: For `push_to_hub`.

        Returns:
            The commit's address where pushed, else None.

        Raises:
            HeadError: the head cannot be stored in any form; nothing was written.
            FolderError: the folder cannot be written; what was there before is whole.
            WeightsError: the trunk is stored in another repository, and is not that one any more; nothing was written.
            HubError: it was saved, but could not be pushed; or that repository cannot be read.
        """
        if push_to_hub_kwargs and not push_to_hub:
            raise ArgumentError(f"save_pretrained: unknown keyword {', '.join(sorted(push_to_hub_kwargs))}")
        if config is not None:
            raise ArgumentError("save_pretrained: a tower saves its own config; change tower.config instead")
        if not is_main_process:
            return None
        try:
            push = PushOptions(**push_to_hub_kwargs)
        except TypeError as error:
            raise ArgumentError(f"save_pretrained(push_to_hub=True): {error}") from error
        cards = CardOptions(as_tags(tags), license, model_card_kwargs or {}, metrics, evaluated_on, repo_id=repo_id)
        options, access = SaveOptions(cards, include_code, max_shard_size), Access(token=push.token)
        weights = self.state_dict() if state_dict is None else state_dict
        pinned = None if trunk is False else kept_trunk_source(self.config, weights, access)
        saved = self._save(save_directory, options, pinned, access, state_dict)
        if not push_to_hub:
            return None
        place = repo_id or default_repo_id(save_directory)
        return push_folder(Path(save_directory), place, partial(saved.card, cards), saved.names, push)

    def _save(
        self,
        folder: str | os.PathLike[str],
        options: SaveOptions,
        trunk: TrunkSource | None = None,
        access: Access | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> Saved:
        cls = type(self)
        tower = self if state_dict is None else with_weights(self, state_dict)
        proven, known = storable_config(
            tower,
            own_trunk=overrides(cls, "_create_trunk"),
            own_head=overrides(cls, "_create_head"),
            include_code=options.include_code,
        )
        stored = copy.deepcopy(proven.stored)
        stored.tower_class = cls.__name__ if any(overrides(cls, step) for step in OVERRIDABLE) else None
        stored.tower_kwargs = added_arguments(self) or None
        stored.trunk_source = None if trunk is None else trunk.to_json()
        load = partial(load_tower, cls, trust_remote_code=bool(proven.sources), access=access)
        saved = save_tower(tower, stored, folder, load, options, sources=proven.sources, form_is_proven=known)
        self._fingerprint, self._proven = saved.fingerprint, proven
        return saved

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        config: dict[str, Any] | None = None,
        commit_message: str = COMMIT_MESSAGE,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        tags: str | Sequence[str] = (),
        license: str | None = None,
        metrics: Mapping[str, float] | None = None,
        evaluated_on: str | None = None,
        include_code: bool | None = None,
        trunk: str | Literal[False] | None = None,
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Save the tower, checked as by `save_pretrained`, and push it in one commit.

        What the Hub has already is not sent again: after training the head alone, no byte of the trunk. Of a card
        that was edited on the Hub only the parts between our markers change.

        Args:
            repo_id: `name` or `org/name`; made where it does not exist.
            config, model_card_kwargs, tags, license, metrics, evaluated_on, include_code, max_shard_size: As in
                `save_pretrained`.
            commit_message: The commit's first line.
            private: Of the repository, where this call makes it.
            token: With the right to write; the one that is logged in by default.
            branch: Made where it does not exist; the main one by default.
            create_pr: Open a pull request instead of committing.
            allow_patterns: Push only files that match.
            ignore_patterns: Do not push files that match.
            delete_patterns: Delete further files of the repository that match.
            trunk: `org/name@revision` of a tower or timm repository that has this tower's trunk, bit for bit. Only the
                head is pushed; loading fetches the trunk from there, at the commit that it has now. None: the trunk
                that the tower was loaded with, where it has one elsewhere. False: the whole tower is pushed.

        Returns:
            The commit's address (the pull request's with `create_pr`).

        Raises:
            HeadError, TowerError: the tower cannot be saved; nothing was sent.
            WeightsError: the trunk is not the one that `trunk` names, or no longer the one that the tower was loaded
                with.
            HubError: the repository cannot be written; nothing was committed.
        """
        if config is not None:
            raise ArgumentError("push_to_hub: a tower pushes its own config; change tower.config instead")
        access = Access(token=token)
        if isinstance(trunk, str):
            source: TrunkSource | None = find_trunk(trunk, self.state_dict(), access)
        else:
            source = kept_trunk_source(self.config, self.state_dict(), access) if trunk is None else None
        cards = CardOptions(as_tags(tags), license, model_card_kwargs or {}, metrics, evaluated_on)
        with scratch_folder("hf_timm_tower_push_") as scratch:
            folder = scratch / "tower"
            saved = self._save(folder, SaveOptions(cards, include_code, max_shard_size), source, access)
            return push_folder(
                folder,
                repo_id,
                partial(saved.card, cards),
                saved.names,
                PushOptions(
                    commit_message=commit_message,
                    private=private,
                    token=token,
                    branch=branch,
                    create_pr=create_pr,
                    allow_patterns=allow_patterns,
                    ignore_patterns=ignore_patterns,
                    delete_patterns=delete_patterns,
                ),
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        subfolder: str | None = None,
        device: str | torch.device | None = None,
        map_location: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        strict: bool = True,
        custom_head: CustomHead | None = None,
        trust_remote_code: bool = False,
        verify: bool = False,
        image_size: int | Sequence[int] | None = None,
        frozen: bool = True,
        mmap: bool = True,
        drop: float | None = None,
        drop_path: float | None = None,
        patch_drop: float | None = None,
    ) -> Self:
        """Load a tower from a folder or a repository, in eval mode. Reads JSON and safetensors, runs nobody's code.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's id.
            revision: Branch, tag or commit of the repository.
            token: For private and gated repositories.
            cache_dir: Where downloads are kept.
            force_download: Download again.
            local_files_only: Do not go to the network.
            subfolder: Folder inside the repository or folder.
            device: Where the tower goes; `map_location` is another name of it.
            map_location: See `device`.
            dtype: Cast floating-point weights; None keeps what was saved.
            strict: False ignores weights in the files that the tower has no place for, and lists them in a warning.
                Missing weights are an error in any case.
            custom_head: Takes the place of the stored head; checked against the weights key by key, and against the
                fingerprint.
            trust_remote_code: Run the source of a head that is stored as code. Nothing else ever runs.
            verify: Run the probe and raise unless the outputs are those of the saved tower within tolerance.
            image_size: Change the input size after loading, as `set_input_size`.
            frozen: Freeze what was frozen when the tower was saved; False: everything trains.
            mmap: Map the weight files, so that they are not copied; False reads them into memory, for files that
                somebody may overwrite in place (`cp`) while the tower is in use.
            drop: Dropout of the projection for the next training, in place of the stored one; no weight changes, nor
                what the tower gives in eval mode.
            drop_path: The same for the trunk's stochastic depth.
            patch_drop: The same for the trunk's patch dropout.

        Raises:
            FolderError, FormatError, WeightsError, ConfigError, HeadError: by what is wrong with the folder.
        """
        for place in (device, map_location):
            check_device(place)
        if device is not None and map_location is not None and torch.device(device) != torch.device(map_location):
            raise ArgumentError(f"device={device} and map_location={map_location} contradict each other")
        access = Access(token, cache_dir, force_download, local_files_only)
        cast = floating_dtype(dtype)
        folder = fetch_tower(
            pretrained_model_name_or_path,
            revision=revision,
            access=access,
            subfolder=subfolder,
            trust_remote_code=trust_remote_code,
        )
        tower = load_tower(
            cls,
            folder,
            custom_head=custom_head,
            strict=strict,
            trust_remote_code=trust_remote_code,
            origin=f"{pretrained_model_name_or_path}" + (f"@{revision}" if revision else ""),
            dtype=cast,
            device=device if device is not None else map_location,
            access=replace(access, force_download=False),
            frozen=frozen,
            mmap=mmap,
            rates=Rates(drop, drop_path, patch_drop),
        )
        commit = None if Path(pretrained_model_name_or_path).is_dir() else commit_of(folder)
        tower._origin = {"loaded_from": str(pretrained_model_name_or_path), "commit": commit}
        if verify:
            found = tower.verify()
            if found.status == "different":
                raise TowerError(
                    f"{pretrained_model_name_or_path} does not give the outputs it was saved with: {found}"
                )
        if image_size is not None:
            tower.set_input_size(image_size)
        return tower

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that saving would write, with no earlier one to keep.

        Args:
            args: Of the mixin; refused.
            kwargs: As `model_card_kwargs` of `save_pretrained`, and `repo_id`.

        Raises:
            ArgumentError: a keyword that no card has.
            HeadError, ConfigError: the tower could not be saved.
        """
        if args:
            raise ArgumentError("generate_model_card takes keywords: repo_id and metadata of the card")
        repo_id = kwargs.pop("repo_id", None)
        proven, _ = storable_config(self, own_trunk=overrides(type(self), "_create_trunk"),
                                    own_head=overrides(type(self), "_create_head"))  # fmt: skip
        return ModelCard(
            CardOptions(more=kwargs, repo_id=repo_id).make(tower_facts(self), proven.stored, None, weight_digests(self))
        )

    def verify(self) -> Verification:
        """Whether the tower gives the outputs that it was saved with, on this timm, torch and device.

        Raises:
            FolderError: it was neither saved nor loaded yet, or its folder has no fingerprint.
        """
        return verify(self)
