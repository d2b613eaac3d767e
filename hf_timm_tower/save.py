"""Tower -> proven folder: both `TimmModel` and the transformers models save through here."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from .build import check_embedding, example_input
from .files.fingerprint import make_fingerprint, weight_digests
from .files.json import write_json
from .files.names import CARD_NAME, CONFIG_NAME, FINGERPRINT_NAME, PREPROCESSOR_NAME
from .files.open_folder import read_text
from .files.same_save import facts_in_tower, processor_dict, tie_digests
from .files.sentence_transformers import write_sentence_files
from .files.staging import staged_folder
from .files.ties import find_ties
from .files.weights import write_weights
from .heads.stored_form import store_head
from .hub.card import CardOptions, TowerFacts, tower_facts
from .hub.reader_file import AUTO_MAP, write_reader
from .hub.trunk_source import is_separable
from .proof import bare_tower, form_of, prove, refuse_changing_hooks
from .reader.config import FOR_TIMM, TimmTowerConfig
from .reader.errors import WeightsError
from .reader.graph_head import GraphHead
from .reader.head import LIVE, SUBCLASS, builtin_head
from .reader.skip_init import skip_init
from .reader.tower import plain_defaults
from .reader.trunk import native_size
from .reader.weights import assign_weights
from .training.freezing import describe_frozen, head_without_lock
from .training.sharding import refuse_sharded
from .trunk_facts import record_changes


@dataclass(frozen=True)
class SaveOptions:
    """What a save is asked for beside the tower.

    Attributes:
        cards: What the caller wants in the card.
        include_code: True: also the source of a head that comes back in no other form; False: no code at all.
        max_shard_size: Largest weight file, in bytes or as `"5GB"`.
    """

    cards: CardOptions
    include_code: bool | None = None
    max_shard_size: int | str = "5GB"


@dataclass(frozen=True)
class Saved:
    """A tower that was saved.

    Attributes:
        facts: What its card says of it.
        config: As it was written.
        fingerprint: As it was written.
        names: The files that were written, by their paths in the folder.
    """

    facts: TowerFacts
    config: TimmTowerConfig
    fingerprint: dict[str, Any]
    names: tuple[str, ...]

    def card(self, options: CardOptions, repo_id: str, existing: str | None) -> str:
        """The card for a repository, made out of the one that is there (None where there is none)."""
        return replace(options, repo_id=repo_id).make(self.facts, self.config, existing, self.fingerprint["weights"])


@dataclass(frozen=True)
class ProvenForm:
    """What an earlier save of the same tower found and proved, and for which form of it.

    Attributes:
        form: From `proof.form_of`.
        config: The config that it was proven for, as JSON.
        stored: The config in its stored form.
        sources: Files that the head needs.
    """

    form: tuple[Any, ...]
    config: str
    stored: TimmTowerConfig
    sources: Mapping[str, str]


@plain_defaults()
def storable_config(
    tower: Any, *, own_trunk: bool = False, own_head: bool = False, include_code: bool | None = None
) -> tuple[ProvenForm, bool]:
    """The tower's config with trunk and head in the form in which they come back, verified, and files it needs.

    Args:
        tower: With `config` (completed), `trunk` and `head`; it is not changed.
        own_trunk: A subclass of TimmModel makes the trunk by its own code.
        own_head: A subclass of TimmModel makes the head by its own code.
        include_code: True: a head that comes back in no other form is stored as code.

    Returns:
        What is stored, with what is frozen now; and whether an earlier save of this tower in this process proved the
        same form, so that only weights may have changed.

    Raises:
        HeadError: no form of the head works.
        ConfigError: the trunk was changed in a way that no config says.
    """
    refuse_sharded(tower.state_dict(keep_vars=True))
    key = json.dumps([tower.config.to_dict(), own_trunk, own_head, include_code], sort_keys=True, default=str)
    form = form_of(tower)
    earlier: ProvenForm | None = getattr(tower, "_proven", None)
    if earlier is not None and earlier.form == form and earlier.config == key:
        stored = copy.deepcopy(earlier.stored)
        stored.frozen = describe_frozen(tower)
        return replace(earlier, stored=stored), True
    stored = copy.deepcopy(tower.config) if own_trunk else record_changes(tower.trunk, copy.deepcopy(tower.config))
    sources: dict[str, str] = {}
    live = tower.head
    if stored.head is None and not _is_builtin(live, stored):
        # somebody put another head in its place, or other layers into it
        stored.head, stored.proj = {"form": LIVE}, "none"
    if stored.head is not None:
        name = stored.head.get("class") if isinstance(live, GraphHead) else None
        with head_without_lock(tower):
            head, example = _on_cpu(live), example_input(stored, tower.trunk)
            stored.embed_dim = None
            stored.embed_dim = check_embedding(stored, head, example)
            if own_head:
                stored.head = {"form": SUBCLASS}
            else:
                stored.head, sources = store_head(head, example, code_for=stored if include_code else None)
        stored.head["class"] = name or type(live).__name__
    stored.frozen = describe_frozen(tower)
    return ProvenForm(form, key, stored, sources), False


@plain_defaults()
def save_tower(
    tower: Any,
    config: TimmTowerConfig,
    folder: str | os.PathLike[str],
    load: Callable[[Path], Any],
    options: SaveOptions,
    *,
    sources: Mapping[str, str],
    form_is_proven: bool = False,
) -> Saved:
    """Write a tower beside the folder, load it back, prove it, and only then put it in place.

    Args:
        tower: Has `trunk`, `head` and maybe `classifier`; may be on any device, in any mode. It is not changed.
        config: A completed config whose `head` has its stored form.
        folder: Where the tower goes; what is there before survives an error and a kill.
        load: Loads a tower from a folder onto the CPU, in eval mode.
        options: Card, code and so on.
        sources: File name -> text, for a head that is stored as code.
        form_is_proven: An earlier save proved this form: only the bytes are proven.

    Raises:
        TowerError: nothing was written: the folder cannot be written, or what was loaded back is not the same.
    """
    cards, with_reader = options.cards, options.include_code is not False
    cards = replace(cards, include_code=with_reader)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        bare = bare_tower(tower)
        facts = tower_facts(tower)
        with staged_folder(folder) as staging:
            write_json(staging / CONFIG_NAME, _written(config, with_reader))
            write_json(staging / PREPROCESSOR_NAME, processor_dict(config) if with_reader else facts_in_tower(config))
            for name, source in sources.items():
                (staging / name).write_bytes(source.encode("utf-8"))
            if with_reader:
                write_reader(staging)
            with ThreadPoolExecutor(1) as beside:  # hashing takes as long as writing
                digests = beside.submit(weight_digests, bare)
                _write_weights(staging, bare, config, options.max_shard_size)
            again = load(staging)
            outputs = prove(bare, again, config, form_is_proven=form_is_proven)
            if not form_is_proven:
                refuse_changing_hooks(tower, config, outputs)
            fingerprint = make_fingerprint(outputs, again, config.in_chans, native_size(config), digests.result())
            fingerprint |= tie_digests(staging)
            write_json(staging / FINGERPRINT_NAME, fingerprint)
            write_sentence_files(staging, Path(folder), outputs)
            card = cards.make(facts, config, read_text(Path(folder, CARD_NAME)), fingerprint["weights"])
            (staging / CARD_NAME).write_bytes(card.encode("utf-8"))
            names = tuple(sorted(path.name for path in staging.iterdir()))
    return Saved(facts, config, fingerprint, names)


def with_weights(tower: Any, state_dict: Mapping[str, torch.Tensor]) -> Any:
    """The tower with other weights, where they had to be gathered from several devices or processes: a bare copy.

    Raises:
        WeightsError: the weights are not the tower's.
    """
    own = tower.state_dict(keep_vars=True)
    if own.keys() == state_dict.keys() and all(own[key].data_ptr() == state_dict[key].data_ptr() for key in own):
        return tower
    twin = bare_tower(tower, state_dict)
    assign_weights(twin, state_dict, source="state_dict", device="cpu")
    return twin


def _written(config: TimmTowerConfig, include_code: bool) -> dict[str, Any]:
    """What `config.json` holds; transformers finds its classes by `architectures` and `auto_map`."""
    written: dict[str, Any] = json.loads(config.to_json_string())
    written["architectures"] = written.get("architectures") or ["TimmTowerModel"]
    for name in ("auto_map", "custom_pipelines"):  # where code is found is decided by each save anew
        written.pop(name, None)
    written[FOR_TIMM] = True
    return {**written, "auto_map": AUTO_MAP} if include_code else written


def _write_weights(staging: Path, tower: nn.Module, config: TimmTowerConfig, max_shard_size: int | str) -> None:
    if config.trunk_source is None:
        write_weights(staging, tower, max_shard_size)
        return
    state = tower.state_dict(keep_vars=True)
    ties = find_ties(tower, state)
    if not is_separable((*ties.tied, *ties.shared)):
        raise WeightsError("the head shares weights with the trunk, so it cannot be published without it")
    head = {key: tensor for key, tensor in state.items() if not key.startswith("trunk.")}
    if not head:
        raise WeightsError("the head has no weights, so there is nothing to publish beside the trunk")
    write_weights(staging, tower, max_shard_size, state=head)


def _on_cpu(head: nn.Module) -> nn.Module:
    if all(tensor.device.type == "cpu" for tensor in (*head.parameters(), *head.buffers())):
        return head
    return copy.deepcopy(head).to("cpu")


def _is_builtin(head: nn.Module, config: TimmTowerConfig) -> bool:
    with skip_init():
        made = builtin_head(config)
    return repr(head) == repr(made) and [type(m) for m in head.modules()] == [type(m) for m in made.modules()]
