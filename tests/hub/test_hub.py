"""Push and load over HTTP, through the real client, against the loopback Hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_timm_tower import ArgumentError, ConfigError, HeadError, HubError, WeightsError

from .. import hub_calls as calls
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

TOWER_FILES = {
    "config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "trunk.safetensors",
    "head.safetensors",
    "fingerprint.json",
    "modules.json",
    "sentence_bert_config.json",
    "README.md",
}
NOT_READ = {"README.md", "modules.json", "sentence_bert_config.json"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    users = {"ann": "hf_ann", "bob": "hf_bob"}
    with LocalHub(tmp_path_factory.mktemp("hub"), users=users, readers={"eve": "hf_eve"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ann(hub: LocalHub, cache: Path) -> Iterator[HubWorker]:
    worker = HubWorker(hub.env(cache))
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def _no_faults(hub: LocalHub) -> Iterator[None]:
    hub.forget()
    yield
    hub.faults()


def weight_bytes(hub: LocalHub) -> int:
    """Bytes of weight files that went to clients since the log was forgotten."""
    sizes = hub.downloaded().items()
    return sum(size for path, size in sizes if path.startswith("/_storage/") or path.endswith(".safetensors"))


# --- round trips


def test_a_new_repository_holds_the_whole_tower_and_gives_it_back(hub: LocalHub, ann: HubWorker) -> None:
    url, numbers = ann.call(calls.push, "ann/new", 1)
    assert re.fullmatch(re.escape(hub.url) + r"/ann/new/commit/[0-9a-f]{40}", url)
    names = ann.call(calls.list_files, "ann/new")
    assert set(names) >= TOWER_FILES
    assert {name.split("/")[0] for name in names} <= TOWER_FILES | {"modeling_timm_tower.py", ".gitattributes"}
    assert ann.call(calls.load, "ann/new") == numbers
    files = ann.call(calls.read_files, "ann/new", ["trunk.safetensors", "head.safetensors"])
    assert sorted(hub.uploaded().values()) == sorted(len(data) for data in files.values()), "trunk + head, once each"


def test_a_push_is_one_commit(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/one-commit", 1)
    before = ann.call(calls.api, "list_repo_commits", "ann/one-commit")
    ann.call(calls.push, "ann/one-commit", 2)
    assert len(ann.call(calls.api, "list_repo_commits", "ann/one-commit")) == len(before) + 1


def test_second_push_after_training_the_head_sends_no_byte_of_the_trunk(hub: LocalHub, ann: HubWorker) -> None:
    ann.call(calls.push, "ann/second", 1)
    hub.forget()
    numbers = ann.call(calls.train_head_and_push, "ann/second", 5)
    files = ann.call(calls.read_files, "ann/second", ["trunk.safetensors", "head.safetensors"])
    assert list(hub.uploaded().values()) == [len(files["head.safetensors"])]
    assert ann.call(calls.load, "ann/second") == numbers


def test_a_tower_in_the_cache_is_loaded_without_a_byte_of_weights(hub: LocalHub, ann: HubWorker) -> None:
    _, numbers = ann.call(calls.push, "ann/cached", 1)
    assert ann.call(calls.load, "ann/cached") == numbers
    assert weight_bytes(hub) > 0
    hub.forget()
    assert ann.call(calls.load, "ann/cached") == numbers
    assert weight_bytes(hub) == 0
    assert ann.call(calls.load, "ann/cached", force_download=True) == numbers
    assert weight_bytes(hub) > 0


def test_only_what_loading_reads_is_downloaded(hub: LocalHub, ann: HubWorker, tmp_path: Path) -> None:
    ann.call(calls.push, "ann/lean", 1)
    ann.call(calls.push_files, "ann/lean", {"optimizer.pt": b"x" * 100_000, "extra.safetensors": b"y" * 100_000})
    hub.forget()
    ann.call(calls.load, "ann/lean", cache_dir=str(tmp_path / "cache"))
    snapshot = next((tmp_path / "cache").glob("models--*/snapshots/*"))
    assert {path.name for path in snapshot.rglob("*")} == TOWER_FILES - NOT_READ


def test_branch_tag_commit_and_pull_request(hub: LocalHub, ann: HubWorker) -> None:
    url, main = ann.call(calls.push, "ann/refs", 1)
    ann.call(calls.api, "create_tag", "ann/refs", tag="v1")
    _, branch = ann.call(calls.push, "ann/refs", 2, branch="draft")
    opened, pull = ann.call(calls.push, "ann/refs", 3, create_pr=True)
    assert opened == f"{hub.url}/ann/refs/discussions/1"
    _, newest = ann.call(calls.push, "ann/refs", 4)
    revisions = {None: newest, "main": newest, "v1": main, url.rpartition("/")[2]: main, "draft": branch}
    revisions["refs/pr/1"] = pull
    assert len({main, branch, pull, newest}) == 4
    for revision, numbers in revisions.items():
        assert ann.call(calls.load, "ann/refs", revision=revision) == numbers, revision


def test_tower_in_a_subfolder(ann: HubWorker, tmp_path: Path) -> None:
    numbers = ann.call(calls.save, 1, str(tmp_path / "t"))
    files = {f"towers/a/{name}": data for name, data in calls.files_of(str(tmp_path / "t")).items()}
    ann.call(calls.push_files, "ann/inner", files)
    assert ann.call(calls.load, "ann/inner", subfolder="towers/a") == numbers
    with pytest.raises(HubError, match=r"ann/inner at commit [0-9a-f]{40} holds no tower.*subfolder"):
        ann.call(calls.load, "ann/inner")


def test_private_repository_needs_a_token_that_may_read_it(ann: HubWorker, tmp_path: Path) -> None:
    _, numbers = ann.call(calls.push, "ann/secret", 1, private=True)
    assert ann.call(calls.load, "ann/secret") == numbers
    cache = str(tmp_path / "cache")
    with pytest.raises(HubError, match=r"ann/secret cannot be loaded.*private.*token"):
        ann.call(calls.load, "ann/secret", token=False, cache_dir=cache)
    with pytest.raises(HubError, match=r"ann/secret cannot be loaded.*private.*token"):
        ann.call(calls.load, "ann/secret", token="hf_bob", cache_dir=cache)
    with pytest.raises(HubError, match=r"ann/secret cannot be loaded.*token"):
        ann.call(calls.load, "ann/secret", token="hf_nobody", cache_dir=cache)
    assert ann.call(calls.load, "ann/secret", token="hf_ann", cache_dir=cache) == numbers


def test_gated_repository_says_where_to_ask_for_access(hub: LocalHub, ann: HubWorker, tmp_path: Path) -> None:
    _, numbers = ann.call(calls.push, "ann/gated", 1)
    ann.call(calls.api, "update_repo_settings", "ann/gated", gated="manual")
    cache = str(tmp_path / "cache")
    for token in ("hf_bob", False):
        with pytest.raises(HubError, match=rf"ann/gated cannot be loaded.*gated.*{re.escape(hub.url)}/ann/gated"):
            ann.call(calls.load, "ann/gated", token=token, cache_dir=cache)
    assert ann.call(calls.load, "ann/gated", cache_dir=cache) == numbers


def test_push_without_the_right_to_write_says_so_and_changes_nothing(ann: HubWorker) -> None:
    _, numbers = ann.call(calls.push, "ann/mine", 1)
    for token in ("hf_eve", "hf_bob", "hf_nobody"):
        with pytest.raises(HubError, match=r"ann/mine cannot be pushed to.*token"):
            ann.call(calls.push, "ann/mine", 2, token=token)
    assert ann.call(calls.load, "ann/mine") == numbers


def test_missing_repository_and_revision_are_named(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/there", 1)
    with pytest.raises(HubError, match=r"ann/gone cannot be loaded.*no such repository"):
        ann.call(calls.load, "ann/gone")
    with pytest.raises(HubError, match=r"ann/there cannot be loaded at revision 'v9'.*no revision 'v9'"):
        ann.call(calls.load, "ann/there", revision="v9")
    with pytest.raises(HubError, match=r"no such folder, and not the id of a repository"):
        ann.call(calls.load, "a/b/c")


# --- the cache


def test_offline_after_a_first_load(hub: LocalHub, ann: HubWorker, cache: Path) -> None:
    _, numbers = ann.call(calls.push, "ann/offline", 1)
    ann.call(calls.load, "ann/offline")
    hub.forget()
    assert ann.call(calls.load, "ann/offline", local_files_only=True) == numbers
    assert hub.log() == []
    offline = HubWorker({**hub.env(cache), "HF_HUB_OFFLINE": "1"})
    try:
        assert offline.call(calls.load_with_sockets_blocked, "ann/offline") == numbers
        with pytest.raises(HubError, match=r"ann/never cannot be loaded.*not in the cache"):
            offline.call(calls.load, "ann/never")
    finally:
        offline.close()


def test_a_cache_of_ones_own(ann: HubWorker, tmp_path: Path) -> None:
    _, numbers = ann.call(calls.push, "ann/own-cache", 1)
    assert ann.call(calls.load, "ann/own-cache", cache_dir=str(tmp_path / "mine")) == numbers
    assert (tmp_path / "mine" / "models--ann--own-cache").is_dir()
    assert ann.call(calls.load, "ann/own-cache", cache_dir=str(tmp_path / "mine"), local_files_only=True) == numbers


def test_loading_never_fetches_the_backbone_s_original_weights(hub: LocalHub, ann: HubWorker) -> None:
    _, numbers = ann.call(calls.push, "ann/tagged", 1, trunk_name="test_resnet.r160_in1k")
    hub.forget()
    assert ann.call(calls.load, "ann/tagged") == numbers
    assert {"/".join(entry["path"].split("/")[-1:]) for entry in hub.log() if "timm/" in entry["path"]} == set()
    assert ann.call(calls.load_with_sockets_blocked, "ann/tagged") == numbers


# --- several at once


def test_two_pushes_at_once_leave_one_whole_tower_each_in_its_commit(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/race", 0)
    for attempt in range(3):
        jobs = [ann.start(calls.push, "ann/race", 10 + 2 * attempt + seed) for seed in range(2)]
        pushed = {url.rpartition("/")[2]: numbers for url, numbers in (job.result() for job in jobs)}
        assert len(pushed) == 2
        for commit, numbers in pushed.items():
            assert ann.call(calls.load, "ann/race", revision=commit) == numbers
        assert ann.call(calls.load, "ann/race") in pushed.values()


def test_two_loads_into_one_cache_at_once(ann: HubWorker, tmp_path: Path) -> None:
    _, numbers = ann.call(calls.push, "ann/shared-cache", 1)
    jobs = [ann.start(calls.load, "ann/shared-cache", cache_dir=str(tmp_path / "c")) for _ in range(3)]
    assert [job.result() for job in jobs] == [numbers] * 3


def test_a_push_while_another_loads_gives_one_commit_or_the_other(ann: HubWorker, tmp_path: Path) -> None:
    known = {ann.call(calls.push, "ann/moving", 0)[1]}
    loader = ann.start(calls.load_often, "ann/moving", 12, str(tmp_path / "c"))
    for seed in range(1, 5):
        known.add(ann.call(calls.push, "ann/moving", seed)[1])
    found = set(loader.result())
    assert found <= known, "a mix of two commits"


# --- what is not a tower


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"config.json": b'{"architecture": "resnet18", "num_classes": 10}'}, r"TimmModel\.from_timm\('ann/x"),
        ({"open_clip_config.json": b"{}", "config.json": b'{"model_type": "clip"}'}, r"open_clip"),
        ({"config.json": b'{"model_type": "bert"}'}, r"transformers checkpoint of model_type 'bert'.*AutoModel"),
        ({"pytorch_model.bin": b"\x80\x04."}, r"config\.json is missing.*pickled"),
        ({"notes.txt": b"hello"}, r"config\.json is missing"),
        ({"adapter_config.json": b"{}"}, r"peft"),
    ],
    ids=["timm", "open_clip", "transformers", "pickle", "nothing", "peft"],
)
def test_repository_without_a_tower_says_what_it_seems_to_be(
    ann: HubWorker, files: dict[str, bytes], hint: str, request: pytest.FixtureRequest
) -> None:
    repo = f"ann/x-{request.node.callspec.id}"
    ann.call(calls.push_files, repo, files)
    with pytest.raises((HubError, ConfigError), match=rf"(?s){repo} at commit [0-9a-f]{{40}}.*{hint}"):
        ann.call(calls.load, repo)


# --- the card


def test_what_a_person_wrote_into_the_card_on_the_hub_stays(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/card", 1, license="mit", tags=["digits"])
    card = ann.call(calls.read_files, "ann/card", ["README.md"])["README.md"].decode()
    assert "license: mit" in card
    assert "- digits" in card
    assert 'from_pretrained("ann/card"' in card or 'repo = "ann/card"' in card
    edited = card.replace("license: mit", "license: apache-2.0") + "\nMy own words.\n"
    ann.call(calls.push_files, "ann/card", {"README.md": edited.encode()})
    ann.call(calls.train_head_and_push, "ann/card", 3)
    again = ann.call(calls.read_files, "ann/card", ["README.md"])["README.md"].decode()
    assert "My own words." in again
    assert "license: apache-2.0" in again
    assert again.count("hf_timm_tower: begin about") == 1


def test_unknown_keywords_are_refused_before_anything_is_sent(hub: LocalHub, ann: HubWorker) -> None:
    with pytest.raises(TypeError, match="licence"):
        ann.call(calls.push, "ann/typo", 1, licence="mit")
    with pytest.raises(ArgumentError, match="no_such_key"):
        ann.call(calls.push, "ann/typo", 1, model_card_kwargs={"no_such_key": 1})
    assert hub.log() == []


# --- a head on a trunk that lies elsewhere


def test_head_only_repository_holds_no_trunk_and_gives_the_same_tower(hub: LocalHub, ann: HubWorker) -> None:
    ann.call(calls.push, "ann/public", 1)
    hub.forget()
    _, numbers = ann.call(calls.push_head_on, "ann/head-only", "ann/public", seed=9)
    names = ann.call(calls.list_files, "ann/head-only")
    assert not any(name.startswith(("trunk", "model.safetensors")) and not name.endswith(".json") for name in names)
    head = ann.call(calls.read_files, "ann/head-only", ["head.safetensors", "config.json"])
    assert list(hub.uploaded().values()) == [len(head["head.safetensors"])]
    source = json.loads(head["config.json"])["trunk_source"]
    assert source["repo_id"] == "ann/public"
    assert re.fullmatch(r"[0-9a-f]{40}", source["commit"])
    assert ann.call(calls.load, "ann/head-only") == numbers


def test_head_only_tower_keeps_its_trunk_when_the_trunk_s_repository_goes_on(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/base", 1)
    _, numbers = ann.call(calls.push_head_on, "ann/head-pinned", "ann/base", seed=9)
    ann.call(calls.push, "ann/base", 2)
    assert ann.call(calls.load, "ann/head-pinned") == numbers


def test_head_on_a_timm_repository(ann: HubWorker) -> None:
    ann.call(calls.push_timm, "ann/timm-resnet", 1)
    _, numbers = ann.call(calls.push_head_on_timm, "ann/head-on-timm", "ann/timm-resnet", seed=9)
    assert ann.call(calls.load, "ann/head-on-timm") == numbers
    config = json.loads(ann.call(calls.read_files, "ann/head-on-timm", ["config.json"])["config.json"])
    assert config["trunk_source"]["layout"] == "timm"
    assert config["trunk_source"]["unused"] == ["fc.bias", "fc.weight"]


def test_trunk_that_is_not_the_tower_s_own_is_refused_and_nothing_is_pushed(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/other-trunk", 1)
    with pytest.raises(WeightsError, match=r"ann/other-trunk.*not this tower's trunk.*weights differ"):
        ann.call(calls.push, "ann/wrong-head", 2, trunk="ann/other-trunk")
    with pytest.raises(HubError, match=r"ann/wrong-head.*no such repository"):
        ann.call(calls.load, "ann/wrong-head")


def test_trunk_that_may_not_be_read_or_is_gone_is_named(ann: HubWorker, tmp_path: Path) -> None:
    ann.call(calls.push, "ann/licensed", 1)
    _, numbers = ann.call(calls.push_head_on, "ann/free-head", "ann/licensed", seed=9)
    ann.call(calls.api, "update_repo_settings", "ann/licensed", gated="manual")
    refusal = r"(?s)only the head.*trunk is stored in ann/licensed at commit [0-9a-f]{40}.*gated"
    with pytest.raises(HubError, match=refusal):
        ann.call(calls.load, "ann/free-head", token="hf_bob", cache_dir=str(tmp_path / "bob"))
    assert ann.call(calls.load, "ann/free-head", token="hf_ann", cache_dir=str(tmp_path / "ann")) == numbers
    ann.call(calls.api, "delete_repo", "ann/licensed")
    with pytest.raises(HubError, match=r"(?s)trunk is stored in ann/licensed.*could not be fetched"):
        ann.call(calls.load, "ann/free-head", cache_dir=str(tmp_path / "later"))


def test_trunk_whose_bytes_are_not_those_that_were_pinned_is_refused(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/pinned-base", 1)
    ann.call(calls.push_head_on, "ann/pinned-head", "ann/pinned-base", seed=9)
    config = json.loads(ann.call(calls.read_files, "ann/pinned-head", ["config.json"])["config.json"])
    config["trunk_source"]["files"]["trunk.safetensors"] = "0" * 64
    ann.call(calls.push_files, "ann/pinned-head", {"config.json": json.dumps(config).encode()})
    with pytest.raises(WeightsError, match=r"ann/pinned-base.*SHA-256.*another trunk"):
        ann.call(calls.load, "ann/pinned-head")


def is_head_only(ann: HubWorker, repo: str) -> bool:
    names = ann.call(calls.list_files, repo)
    return "head.safetensors" in names and not any(re.match(r"(trunk|model).*\.safetensors$", name) for name in names)


@pytest.mark.parametrize(
    "push_again",
    [
        calls.train_head_and_push,
        calls.train_and_push_face,
        calls.train_head_and_save_with_push,
        calls.train_face_and_save_with_push,
        calls.train_head_and_upload_folder,
        calls.train_face_and_upload_folder,
    ],
    ids=["timm", "face", "timm by a save", "face by a save", "timm by a folder", "face by a folder"],
)
def test_head_only_repository_pushed_again_does_not_publish_its_trunk(ann: HubWorker, push_again: object) -> None:
    repo = f"ann/again-{push_again.__name__}"  # type: ignore[attr-defined]
    ann.call(calls.push, "ann/kept", 1)
    ann.call(calls.push_head_on, repo, "ann/kept", seed=9)
    before = json.loads(ann.call(calls.read_files, repo, ["config.json"])["config.json"])["trunk_source"]
    numbers = ann.call(push_again, repo, 5)
    assert is_head_only(ann, repo)
    assert json.loads(ann.call(calls.read_files, repo, ["config.json"])["config.json"])["trunk_source"] == before
    assert ann.call(calls.load, repo) == numbers
    numbers = ann.call(push_again, f"{repo}-copy", 6, source=repo)
    assert is_head_only(ann, f"{repo}-copy")
    assert ann.call(calls.load, f"{repo}-copy") == numbers


@pytest.mark.parametrize("push_again", [calls.train_head_and_push, calls.train_and_push_face], ids=["timm", "face"])
def test_trunk_that_was_trained_is_not_published_unasked(hub: LocalHub, ann: HubWorker, push_again: object) -> None:
    repo = f"ann/trained-{push_again.__name__}"  # type: ignore[attr-defined]
    ann.call(calls.push, "ann/kept-2", 1)
    ann.call(calls.push_head_on, repo, "ann/kept-2", seed=9)
    hub.forget()
    with pytest.raises(WeightsError, match=r"ann/kept-2 at commit .*weights differ.*trunk=False"):
        ann.call(push_again, repo, 5, part="trunk")
    assert hub.uploaded() == {}
    assert is_head_only(ann, repo)
    numbers = ann.call(push_again, repo, 5, part="trunk", trunk=False)
    assert ann.call(calls.load, repo) == numbers
    assert not is_head_only(ann, repo)


# --- what a push takes from a folder, and leaves in a repository


def test_code_in_the_repository_that_no_save_wrote_stays(ann: HubWorker) -> None:
    mine = {f"core/{name}.py": b"# mine" for name in ("checkpoint", "modeling", "engine")} | {"head_code.py": b"# mine"}
    ann.call(calls.push_files, "ann/engine", mine)
    ann.call(calls.push, "ann/engine", 1)
    assert ann.call(calls.read_files, "ann/engine", list(mine)) == mine


def test_only_the_files_that_are_named_are_pushed_and_the_folder_stays_as_it_is(ann: HubWorker, tmp_path: Path) -> None:
    numbers = ann.call(calls.save, 1, str(tmp_path / "t"))
    names = sorted(calls.files_of(str(tmp_path / "t")))
    (tmp_path / "t" / "secret.txt").write_text("mine")
    (tmp_path / "t" / "checkpoint-1").mkdir()
    (tmp_path / "t" / "checkpoint-1" / "optimizer.pt").write_bytes(b"x")
    before = calls.files_of(str(tmp_path / "t"))
    ann.call(calls.push_saved, str(tmp_path / "t"), "ann/named", names)
    assert calls.files_of(str(tmp_path / "t")) == before
    assert set(ann.call(calls.list_files, "ann/named")) - {".gitattributes"} == set(names)
    assert ann.call(calls.read_files, "ann/named", ["README.md"])["README.md"] == b"# ann/named None\n"
    assert ann.call(calls.load, "ann/named") == numbers
    (tmp_path / "t" / "head.safetensors").unlink()
    (tmp_path / "t" / "head.safetensors").symlink_to("secret.txt")
    with pytest.raises(HubError, match=r"head\.safetensors is not the file that was saved"):
        ann.call(calls.push_saved, str(tmp_path / "t"), "ann/named", names)


def test_a_card_on_the_hub_that_is_too_long_to_be_a_card_stops_the_push(ann: HubWorker) -> None:
    ann.call(calls.push, "ann/long-card", 1)
    ann.call(calls.push_files, "ann/long-card", {"README.md": b"x" * (2**20 + 1)})
    with pytest.raises(HubError, match=r"ann/long-card cannot be pushed to.*README\.md: 1048577 bytes"):
        ann.call(calls.push, "ann/long-card", 2)


# --- heads stored as code


def test_head_of_code_is_refused_with_its_place_and_runs_only_when_trusted(ann: HubWorker, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="include_code=True"):
        ann.call(calls.push_code_head, "ann/code")
    url, numbers = ann.call(calls.push_code_head, "ann/code", include_code=True)
    commit = url.rpartition("/")[2]
    card = ann.call(calls.read_files, "ann/code", ["README.md"])["README.md"].decode()
    assert "head_code.py" in card
    assert "trust_remote_code=True" in card
    cache = str(tmp_path / "cache")
    with pytest.raises(HeadError, match=rf"(?s)ann/code at revision {commit}.*head_code\.py.*trust_remote_code=True"):
        ann.call(calls.load, "ann/code", revision=commit, cache_dir=cache)
    assert not list((tmp_path / "cache").rglob("*.py")), "code that nobody trusts is not even fetched"
    assert ann.call(calls.load_in_new_process, "ann/code", cache, trust_remote_code=True) == numbers


def test_head_of_code_that_was_changed_on_the_hub_is_not_run(ann: HubWorker) -> None:
    ann.call(calls.push_code_head, "ann/code-changed", include_code=True)
    ann.call(calls.push_files, "ann/code-changed", {"head_code.py": b"raise SystemExit('it ran')\n"})
    with pytest.raises(HeadError, match=r"head_code\.py: not the code that this tower was saved with"):
        ann.call(calls.load, "ann/code-changed", trust_remote_code=True)
