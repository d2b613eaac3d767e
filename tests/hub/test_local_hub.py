"""The loopback Hub does what the Hub does, as far as the unmodified `huggingface_hub` client can tell.

Clients run in processes of their own: the address of the Hub is read when `huggingface_hub` is imported.
"""

import functools
import hashlib
import importlib.util
import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote

import psutil
import pytest

from ..local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., str]


@functools.cache
def git_patterns() -> ModuleType:
    """scripts/local_hub/git_patterns.py, which imports nothing of the rest."""
    path = ROOT / "scripts" / "local_hub" / "git_patterns.py"
    spec = importlib.util.spec_from_file_location("git_patterns", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLIENT = """
import hashlib, os, sys, tempfile, threading, time
from pathlib import Path
from huggingface_hub import (
    CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download)
from huggingface_hub.errors import (
    GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)

api = HfApi()

def same(left, right):
    left, right = Path(left), Path(right)
    names = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names(left) == names(right) - {".gitattributes"}, (names(left), names(right))
    for name in names(left):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name

def raises(kind, call, status=None):
    try:
        call()
    except Exception as error:
        assert type(error) is kind, (type(error), error)
        assert status is None or error.response.status_code == status, error.response
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    users = {"ann": "hf_ann", "bob": "hf_bob"}
    with LocalHub(
        tmp_path_factory.mktemp("hub") / "store", users, readers={"eve": "hf_eve"}, orgs={"lab": ["ann"]}
    ) as running:
        yield running


@pytest.fixture
def hub(served: LocalHub) -> LocalHub:
    served.faults()
    served.forget()
    return served


@pytest.fixture
def client(fresh_process: Run, hub: LocalHub, tmp_path: Path) -> Run:
    """`client(code, *args)` runs code against `hub` with an empty cache of the test's own, as the first user."""

    def run(code: str, *args: object, token: str | None = "") -> str:
        return fresh_process(CLIENT + textwrap.dedent(code), *args, env=hub.env(tmp_path / "cache", token))

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a tower's repository is made of, small: two weight files, JSON, code in a folder, a card."""
    made = tmp_path / "folder"
    (made / "core").mkdir(parents=True)
    rng = random.Random(1)
    (made / "trunk.safetensors").write_bytes(rng.randbytes(300_000))
    (made / "head.safetensors").write_bytes(rng.randbytes(20_000))
    (made / "picture").write_bytes(b"\x89PNG\0\0" + rng.randbytes(100))
    (made / "config.json").write_text('{"architectures": ["X"], "model_type": "x"}')
    (made / "core" / "ünder score.py").write_text("x = 1\n")
    (made / "empty").touch()
    card = "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\nlicense: mit\ntags: [a]\n---\n# Card\n"
    (made / "README.md").write_text(card)
    return made


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _ask(hub: LocalHub, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """A request by hand, its path sent as it stands."""
    connection = HTTPConnection("127.0.0.1", hub.port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_a_pushed_folder_comes_back_by_branch_tag_commit_and_pull_request(client: Run, folder: Path) -> None:
    client(
        """
        folder, repo = sys.argv[1], api.create_repo("ann/first").repo_id
        assert repo == "ann/first" and api.create_repo(repo, exist_ok=True).repo_id == repo
        raises(HfHubHTTPError, lambda: api.create_repo(repo), 409)

        first = api.upload_folder(repo_id=repo, folder_path=folder)
        api.create_tag(repo, tag="v1")
        api.create_branch(repo, branch="try/this")
        (Path(folder) / "config.json").write_text('{"changed": 1}')
        (Path(folder) / "new.bin").write_bytes(b"new")
        opened = api.upload_folder(repo_id=repo, folder_path=folder, create_pr=True)
        assert opened.pr_revision == "refs/pr/1" and opened.pr_num == 1
        same(folder, snapshot_download(repo, revision="refs/pr/1"))
        api.upload_folder(repo_id=repo, folder_path=folder, revision="try/this")
        same(folder, snapshot_download(repo, revision="try/this"))

        (Path(folder) / "config.json").write_text('{"architectures": ["X"], "model_type": "x"}')
        (Path(folder) / "new.bin").unlink()
        for revision in (None, "main", "v1", first.oid, first.oid[:8]):
            same(folder, snapshot_download(repo, revision=revision))
            assert api.model_info(repo, revision=revision).sha == first.oid
        refs = api.list_repo_refs(repo, include_pull_requests=True)
        assert [ref.name for ref in refs.branches] == ["main", "try/this"]
        assert [ref.name for ref in refs.tags] == ["v1"] and [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
        assert [commit.title for commit in api.list_repo_commits(repo, revision=first.oid)][1:] == ["initial commit"]
        api.delete_branch(repo, branch="try/this"), api.delete_tag(repo, tag="v1")
        raises(RevisionNotFoundError, lambda: api.model_info(repo, revision="v1"))
        """,
        folder,
    )


def test_what_is_told_of_a_repository_is_what_is_in_it(client: Run, folder: Path) -> None:
    client(
        """
        folder, repo = Path(sys.argv[1]), api.create_repo("lab/told").repo_id
        api.upload_folder(repo_id=repo, folder_path=folder)
        info = api.model_info(repo, files_metadata=True)
        assert (info.library_name, info.pipeline_tag, info.card_data.license) == (
            "timm", "image-feature-extraction", "mit")
        assert {"timm", "a", "license:mit", "safetensors"} <= set(info.tags) and info.config["model_type"] == "x"
        for sibling in info.siblings:
            if sibling.rfilename != ".gitattributes":
                content = (folder / sibling.rfilename).read_bytes()
                assert sibling.size == len(content)
                # Large and binary files are LFS, and a binary one that no pattern names.
                assert (sibling.lfs is not None) == (b"\\0" in content[:512] or "safetensors" in sibling.rfilename)
                if sibling.lfs:
                    assert sibling.lfs.sha256 == hashlib.sha256(content).hexdigest()
        tree = list(api.list_repo_tree(repo, recursive=True, expand=True))
        assert {entry.path for entry in tree} == {s.rfilename for s in info.siblings} | {"core"}
        assert {entry.last_commit.oid for entry in tree if entry.path != ".gitattributes"} == {info.sha}
        assert [entry.path for entry in api.list_repo_tree(repo, "core")] == ["core/ünder score.py"]
        assert {entry.path for entry in api.get_paths_info(repo, ["core", "README.md", "no"])} == {"core", "README.md"}

        many = [CommitOperationAdd(f"many/{number}.txt", b"x") for number in range(120)]
        api.create_commit(repo, [*many, CommitOperationAdd(".gitignore", b"*.log\\n")], commit_message="many")
        assert len(list(api.list_repo_tree(repo, "many", expand=True))) == 120  # in pages of 50
        api.create_commit(repo, [CommitOperationAdd("a.log", b"x"), CommitOperationDelete("many/"),
            CommitOperationCopy("head.safetensors", "copy.safetensors")], commit_message="some of each")
        names = set(api.list_repo_files(repo))
        assert "copy.safetensors" in names and not any(n.startswith("many/") or n == "a.log" for n in names)
        raises(RemoteEntryNotFoundError, lambda: api.delete_file("no.txt", repo))
        raises(ValueError, lambda: api.upload_file(
            repo_id=repo, path_in_repo="README.md", path_or_fileobj=b"---\\ntags: 1\\n---\\n"))
        """,
        folder,
    )


def test_unchanged_files_are_not_sent_again(client: Run, hub: LocalHub, folder: Path) -> None:
    push = """
        api.create_repo("ann/again", exist_ok=True)
        api.upload_folder(repo_id="ann/again", folder_path=sys.argv[1])
        """
    sizes = {_sha256(path): path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors"}
    picture = folder / "picture"
    client(push, folder)
    assert hub.uploaded() == {**sizes, _sha256(picture): picture.stat().st_size}

    hub.forget()
    head = folder / "head.safetensors"
    head.write_bytes(random.Random(2).randbytes(20_000))
    client(push, folder)
    assert hub.uploaded() == {_sha256(head): 20_000}

    hub.forget()
    client(push, folder)
    assert hub.uploaded() == {}
    assert not [entry for entry in hub.log() if "/commit/" in entry["path"]]


def test_an_upload_that_is_not_what_was_announced_is_refused(client: Run, hub: LocalHub) -> None:
    client("api.create_repo('ann/announced')")
    content = b"0123456789"
    sha256 = hashlib.sha256(content).hexdigest()
    bearer = {"Authorization": "Bearer hf_ann"}

    def commit() -> tuple[int, bytes]:
        lines = [
            {"key": "header", "value": {"summary": "s"}},
            {"key": "lfsFile", "value": {"path": "f", "algo": "sha256", "oid": sha256, "size": 10}},
        ]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        return _ask(hub, "POST", "/api/models/ann/announced/commit/main", body, **bearer)

    objects = {"operation": "upload", "objects": [{"oid": sha256, "size": 10}]}
    body = json.dumps(objects).encode()
    status, answer = _ask(hub, "POST", "/ann/announced.git/info/lfs/objects/batch", body, **bearer)
    assert status == 200
    link = "/" + json.loads(answer)["objects"][0]["actions"]["upload"]["href"].split("/", 3)[3]
    for wrong in (b"012345678x", b"012345678", b"0123456789a", b""):
        assert _ask(hub, "PUT", link, wrong)[0] == 400
        assert not hub.object_path(sha256).exists()
    assert _ask(hub, "PUT", link.replace(sha256, "0" * 64), content)[0] == 403  # another object than signed for
    assert commit()[0] == 400  # it was never uploaded
    assert _ask(hub, "PUT", link, content)[0] == 200
    assert commit()[0] == 200
    # Bob knows the hash; that opens Ann's file neither for download nor for a repository of his own.
    assert _ask(hub, "GET", f"/_storage/{sha256}", Authorization="Bearer hf_bob")[0] == 403


def test_refusals_are_the_clients_own_errors(client: Run) -> None:
    client(
        """
        bob, eve, nobody, wrong = (HfApi(token=token) for token in ("hf_bob", "hf_eve", False, "hf_wrong"))
        api.create_repo("ann/public"), api.create_repo("ann/private", private=True), api.create_repo("ann/gated")
        api.update_repo_settings("ann/gated", gated="manual")
        for repo in ("ann/public", "ann/private", "ann/gated"):
            api.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="x.bin")

        def get(who, repo, name="x.bin", **more):
            return lambda: who.hf_hub_download(repo, name, local_dir=tempfile.mkdtemp(), **more)

        for who, status in ((bob, 404), (nobody, 401)):
            for repo in ("ann/private", "ann/none", "none"):
                raises(RepositoryNotFoundError, lambda: who.model_info(repo), status)
                raises(RepositoryNotFoundError, get(who, repo), status)
        api.hf_hub_download("ann/private", "x.bin")

        raises(GatedRepoError, get(nobody, "ann/gated"), 401)
        raises(GatedRepoError, get(bob, "ann/gated"), 403)
        assert nobody.model_info("ann/gated").gated == "manual"
        api.grant_access("ann/gated", "bob")
        get(bob, "ann/gated")(), get(api, "ann/gated")()
        api.reject_access_request("ann/gated", "bob", rejection_reason="no")
        raises(GatedRepoError, get(bob, "ann/gated"), 403)

        raises(RevisionNotFoundError, get(api, "ann/public", revision="none"), 404)
        raises(RevisionNotFoundError, get(api, "ann/public", revision="0" * 40), 404)
        raises(RemoteEntryNotFoundError, get(api, "ann/public", "none.bin"), 404)

        assert "Invalid user token" in raises(HfHubHTTPError, wrong.whoami, 401)
        raises(HfHubHTTPError, get(wrong, "ann/public"), 401)
        raises(HfHubHTTPError, lambda: eve.create_repo("eve/new"), 403)
        raises(HfHubHTTPError, lambda: bob.create_repo("ann/new"), 403)
        upload = dict(repo_id="ann/public", path_or_fileobj=b"y", path_in_repo="y.txt")
        raises(HfHubHTTPError, lambda: bob.upload_file(**upload), 403)
        raises(HfHubHTTPError, lambda: bob.create_tag("ann/public", tag="t"), 403)
        raises(HfHubHTTPError, lambda: bob.update_repo_settings("ann/public", private=True), 403)
        raises(HfHubHTTPError, lambda: bob.delete_repo("ann/public"), 403)
        assert bob.upload_file(**upload, create_pr=True).pr_revision == "refs/pr/1"
        raises(RepositoryNotFoundError, lambda: nobody.upload_file(**{**upload, "repo_id": "ann/none"}), 401)

        parent = api.model_info("ann/public").sha
        api.upload_file(**upload, parent_commit=parent)
        raises(HfHubHTTPError, lambda: api.upload_file(
            repo_id="ann/public", path_or_fileobj=b"z", path_in_repo="z", parent_commit=parent), 412)
        api.delete_repo("ann/private")
        assert not api.repo_exists("ann/private") and api.repo_exists("ann/public")
        """
    )


def test_failing_answers_are_retried_by_the_client(client: Run, hub: LocalHub, folder: Path) -> None:
    hub.faults(
        {"path": "/preupload/", "status": 503, "times": 1},
        {"method": "PUT", "path": "/_storage/", "status": 500, "times": 1},
        {"method": "GET", "path": "/_storage/", "nth": 1, "status": 429, "retry_after": 0},
    )
    client(
        """
        api.create_repo("ann/retried")
        api.upload_folder(repo_id="ann/retried", folder_path=sys.argv[1])
        same(sys.argv[1], snapshot_download("ann/retried"))
        """,
        folder,
    )
    assert [rule["met"] for rule in hub.rules()] == [1, 1, 1]
    assert sorted(entry["status"] for entry in hub.log() if entry["fault"]) == [429, 500, 503]


def test_a_connection_that_breaks_is_noticed(client: Run, hub: LocalHub, folder: Path) -> None:
    trunk = _sha256(folder / "trunk.safetensors")
    hub.faults(
        {"method": "PUT", "path": trunk, "cut": "up", "after": 100_000, "times": 1},
        {"method": "GET", "path": f"/_storage/{trunk}", "cut": "down", "after": 70_000, "times": 1},
    )
    client(
        """
        api.create_repo("ann/cut")
        def done(call):
            try:
                return call()
            except Exception as error:  # older clients (1.5) do not try again by themselves
                cause = error.__cause__ or error
                assert type(cause).__name__ == "RemoteProtocolError", cause
                return call()
        done(lambda: api.upload_folder(repo_id="ann/cut", folder_path=sys.argv[1]))
        same(sys.argv[1], done(lambda: snapshot_download("ann/cut")))
        """,
        folder,
    )
    ups = [entry for entry in hub.log() if entry["method"] == "PUT" and trunk in entry["path"]]
    assert [(entry["status"], entry["complete"]) for entry in ups] == [(None, False), (200, True)]
    assert [entry["bytes_in"] for entry in ups] == [100_000, 300_000]
    downs = [entry for entry in hub.log() if entry["method"] == "GET" and trunk in entry["path"]]
    assert [(entry["complete"], entry["bytes_out"]) for entry in downs] == [(False, 70_000), (True, 300_000)]

    hub.faults({"path": "/commit/", "cut": "answer"})
    client(
        """
        before = api.model_info("ann/cut").sha
        message = None
        try:
            api.upload_file(repo_id="ann/cut", path_or_fileobj=b"x", path_in_repo="x.txt")
        except Exception as error:
            message = str(error)
        # The commit was made, and the client cannot know.
        assert message and api.model_info("ann/cut").sha != before, message
        """
    )


def test_a_part_of_a_file_is_sent_on_demand(client: Run, hub: LocalHub, folder: Path) -> None:
    client("api.create_repo('ann/part'); api.upload_folder(repo_id='ann/part', folder_path=sys.argv[1])", folder)
    content = (folder / "trunk.safetensors").read_bytes()
    connection = HTTPConnection("127.0.0.1", hub.port, timeout=10)
    connection.request("GET", "/ann/part/resolve/main/trunk.safetensors")
    answer = connection.getresponse()
    connection.close()
    # To another host, as on the Hub: clients leave their token behind.
    host, storage = answer.headers["Location"].removeprefix("http://").split("/", 1)
    assert (answer.status, host) == (302, f"localhost:{hub.port}")
    for asked, start, end in (("0-9", 0, 10), ("299990-", 299_990, 300_000), ("-7", 299_993, 300_000)):
        assert _ask(hub, "GET", f"/{storage}", Range=f"bytes={asked}") == (206, content[start:end])
    assert _ask(hub, "GET", f"/{storage}", Range="bytes=300000-")[0] == 416
    assert _ask(hub, "GET", f"/{storage}x")[0] == 403


def test_a_corrupted_object_arrives_corrupted_and_slowness_is_slow(client: Run, hub: LocalHub, folder: Path) -> None:
    trunk = folder / "trunk.safetensors"
    get = """
        started = time.monotonic()
        path = hf_hub_download("ann/corrupt", "trunk.safetensors", force_download=True)
        print(path, time.monotonic() - started)
        """
    client("api.create_repo('ann/corrupt'); api.upload_folder(repo_id='ann/corrupt', folder_path=sys.argv[1])", folder)
    hub.faults({"path": "/_storage/", "corrupt": -5})
    path = Path(client(get).split()[0])
    content, right = path.read_bytes(), trunk.read_bytes()
    assert len(content) == len(right)
    assert [at for at in range(len(right)) if content[at] != right[at]] == [len(right) - 5]

    hub.faults({"path": "/_storage/", "rate": 300_000})
    path_text, seconds = client(get).split()
    assert Path(path_text).read_bytes() == right
    assert float(seconds) >= 1.0  # 300,000 bytes


def test_a_restart_keeps_everything(fresh_process: Run, folder: Path, tmp_path: Path) -> None:
    with LocalHub(tmp_path / "store") as hub:
        push = """
            api.create_repo("ann/kept", private=True)
            print(api.upload_folder(repo_id="ann/kept", folder_path=sys.argv[1]).oid)
            api.create_tag("ann/kept", tag="v1")
            """
        sha = fresh_process(CLIENT + textwrap.dedent(push), folder, env=hub.env(tmp_path / "a")).strip()
        other = LocalHub(tmp_path / "store")
        with pytest.raises(RuntimeError, match="another local hub is using"):
            other.start()
        url = hub.url
        hub.restart()
        assert hub.url == url
        load = """
            assert api.model_info("ann/kept").private and api.model_info("ann/kept", revision="v1").sha == sys.argv[2]
            same(sys.argv[1], snapshot_download("ann/kept", revision="v1"))
            """
        fresh_process(CLIENT + textwrap.dedent(load), folder, sha, env=hub.env(tmp_path / "b"))


def _lfs_commit(hub: LocalHub, number: int) -> bool:
    """Commit `number` in a regular and in an LFS file, by hand and without retries; whether it was confirmed."""
    content = str(number).encode().ljust(20_000, b".")
    sha256 = hashlib.sha256(content).hexdigest()
    bearer = {"Authorization": "Bearer hf_ann"}
    batch = json.dumps({"operation": "upload", "objects": [{"oid": sha256, "size": len(content)}]}).encode()
    lines = [
        {"key": "header", "value": {"summary": str(number)}},
        {"key": "file", "value": {"path": "n.txt", "content": str(number)}},
        {"key": "lfsFile", "value": {"path": "n.bin", "oid": sha256, "size": len(content)}},
    ]
    try:
        answer = json.loads(_ask(hub, "POST", "/ann/killed.git/info/lfs/objects/batch", batch, **bearer)[1])
        for actions in [item["actions"] for item in answer["objects"] if "actions" in item]:
            assert _ask(hub, "PUT", "/" + actions["upload"]["href"].split("/", 3)[3], content)[0] == 200
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        assert _ask(hub, "POST", "/api/models/ann/killed/commit/main", body, **bearer)[0] == 200
    except (OSError, HTTPException):
        return False
    return True


def test_a_kill_during_commits_leaves_the_old_or_the_new_state(fresh_process: Run, tmp_path: Path) -> None:
    moments = random.Random(time.time_ns())
    number = confirmed = 0
    with LocalHub(tmp_path / "store") as hub:
        fresh_process(CLIENT + "api.create_repo('ann/killed')", env=hub.env(tmp_path / "first"))
        for _ in range(6):
            number = confirmed = number + 1
            assert _lfs_commit(hub, number)
            killer = threading.Timer(moments.uniform(0, 0.15), hub.kill)
            killer.start()
            alive = True
            while alive:
                number += 1
                alive = _lfs_commit(hub, number)
                confirmed = number if alive else confirmed
            killer.join()
            hub.start()
            status, answer = _ask(hub, "GET", "/api/models/ann/killed/commits/main")
            head = json.loads(answer)[0]
            # What was confirmed is there; what was not is there whole or not at all.
            assert status == 200
            assert confirmed <= int(head["title"]) <= number
            assert _ask(hub, "GET", f"/ann/killed/resolve/{head['id']}/n.txt") == (200, head["title"].encode())
        assert not list((tmp_path / "store" / "tmp").iterdir())
        check = """
            commits = api.list_repo_commits("ann/killed")
            assert len({commit.commit_id for commit in commits}) == len(commits)
            for commit in [*commits[:-1:10], commits[0]]:
                folder = Path(snapshot_download("ann/killed", revision=commit.commit_id))
                assert (folder / "n.txt").read_text() == (folder / "n.bin").read_text().rstrip(".") == commit.title
            """
        fresh_process(CLIENT + textwrap.dedent(check), env=hub.env(tmp_path / "last"))


def test_of_commits_at_once_none_is_lost_and_one_parent_has_one_heir(client: Run) -> None:
    client(
        """
        repo = api.create_repo("ann/crowd").repo_id
        start, outcomes = threading.Barrier(8), []

        def push(number, **more):
            start.wait()
            try:
                api.create_commit(repo, [CommitOperationAdd(f"{number}.txt", str(number).encode()),
                    CommitOperationAdd(f"{number}.bin", os.urandom(9))], commit_message=str(number), **more)
                outcomes.append(200)
            except HfHubHTTPError as error:
                outcomes.append(error.response.status_code)

        def all_at_once(first, **more):
            threads = [threading.Thread(target=push, args=(first + n,), kwargs=more) for n in range(8)]
            [thread.start() for thread in threads], [thread.join() for thread in threads]

        all_at_once(0)
        assert outcomes == [200] * 8
        assert set(api.list_repo_files(repo)) == {".gitattributes"} | {
            f"{n}.{kind}" for n in range(8) for kind in ("txt", "bin")}
        assert len(api.list_repo_commits(repo)) == 9
        outcomes.clear()
        all_at_once(100, parent_commit=api.model_info(repo).sha)
        assert sorted(outcomes) == [200] + [412] * 7
        assert len(api.list_repo_commits(repo)) == 10
        """
    )


def test_nothing_outside_the_store_is_reached_and_nobody_from_outside(client: Run, hub: LocalHub) -> None:
    client("api.create_repo('ann/inside')")
    (hub.store.parent / "settings.json").write_text("{}")
    (hub.store.parent / "f").write_text("outside")
    before = sorted(str(path) for path in hub.store.parent.iterdir())
    bearer = {"Authorization": "Bearer hf_ann"}
    dots = ("../../../../f", "..%2F..%2F..%2F..%2Ff", "%2e%2e/%2e%2e/f", "%2e%2e")
    for name in (*dots, "/etc/passwd", "%2Fetc%2Fpasswd", "a%00b", "a%5Cb"):
        for path in (
            f"/ann/inside/resolve/main/{name}",
            f"/ann/inside/resolve/{name}/config.json",
            f"/api/models/ann/inside/revision/{name}",
            f"/api/models/ann/inside/tree/main/{name}",
            f"/api/models/ann/{name}",
            f"/api/{name}/ann/inside",
            f"/_storage/{name}",
        ):
            for method in ("GET", "PUT", "POST", "DELETE"):
                status, answer = _ask(hub, method, path, b"{}", **bearer)
                assert 400 <= status < 500, (method, path, status, answer)
        body = json.dumps({"name": unquote(name), "organization": "ann"}).encode()
        assert _ask(hub, "POST", "/api/repos/create", body, **bearer)[0] == 400
        branch = f"/api/models/ann/inside/branch/{quote(unquote(name), safe='')}"
        assert _ask(hub, "POST", branch, b"{}", **bearer)[0] == 400
        change = {"key": "file", "value": {"path": unquote(name), "content": "x"}}
        lines = ({"key": "header", "value": {"summary": "s"}}, change)
        commit = b"\n".join(json.dumps(line).encode() for line in lines)
        assert _ask(hub, "POST", "/api/models/ann/inside/commit/main", commit, **bearer)[0] == 400
    assert sorted(str(path) for path in hub.store.parent.iterdir()) == before

    assert _ask(hub, "GET", "/api/whoami-v2", Host=f"example.com:{hub.port}", **bearer)[0] == 421
    assert _ask(hub, "GET", "/api/whoami-v2", **bearer)[0] == 200
    listening = [c.laddr.ip for c in psutil.Process(hub.pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


def test_help_is_quick_and_unknown_faults_are_refused() -> None:
    script = str(ROOT / "scripts" / "local_hub")
    shown = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--store" in shown.stdout
    assert "argparse" in shown.stderr
    assert not [name for name in ("starlette", "uvicorn", "huggingface_hub", "torch") if name in shown.stderr]
    for words in ("status=503 pth=/x", "cut=sideways", "path=/x", "path=( status=500", "status=x"):
        refused = subprocess.run([sys.executable, script, "--fault", words], capture_output=True, text=True)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "fault: " in refused.stderr


# (pattern, path): each makes a regular expression of the same meaning go back and forth without end.
SLOW_AS_REGEX = [
    ("*a" * 30 + "b", "a" * 200),
    ("**a" * 30 + "b", "a" * 200),
    ("**/" * 40 + "b", "a/" * 100 + "a"),
    ("*[ab]" * 30 + "c", "ab" * 100),
    ("*?" * 60 + "b", "a" * 200),
    ("/*a**/" * 20 + "b", "aa/" * 66 + "a"),
]


def test_patterns_match_as_git_does(tmp_path: Path) -> None:
    patterns = ["*.log", "/top", "a/*", "**/deep", "a/**/z", "x?y", "x[!b]y", "[ab].txt", "[!ab].md", "build/"]
    patterns += ["!keep.log", "q\\*", "a/**", "[z-a]"]
    paths = "1.log d/2.log top d/top a/1 a/b/c d/e/deep deep a/z a/b/z a/b/c/z xzy x/y a.txt c.txt a.md c.md build/1"
    paths = [*paths.split(), "keep.log", "d/build/x", "q*", "qq", "other"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for chosen in ([each] for each in patterns):
        (tmp_path / ".gitignore").write_text("\n".join(chosen))
        command = ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "--stdin"]
        asked = subprocess.run(command, input="\n".join(paths), capture_output=True, text=True)
        found = [path for path in paths if git_patterns().is_ignored(path, chosen[0])]
        assert found == asked.stdout.split(), chosen


@pytest.mark.parametrize(("pattern", "path"), SLOW_AS_REGEX)
def test_no_pattern_costs_more_than_its_length(pattern: str, path: str) -> None:
    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)  # a match takes milliseconds, the regular expression years
    try:
        assert not git_patterns().is_ignored(path, pattern)
        assert not git_patterns().is_lfs(path, f"{pattern} filter=lfs")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_files_of_patterns_are_read_up_to_a_size() -> None:
    patterns = git_patterns()
    assert patterns.is_ignored("a", "b\n" * (patterns.MAX_LINES - 1) + "a")
    for text in ("a\n" * (patterns.MAX_LINES + 1), "*" * (patterns.MAX_PATTERN + 1)):
        with pytest.raises(ValueError, match="patterns"):
            patterns.is_ignored("a", text)
        with pytest.raises(ValueError, match="patterns"):
            patterns.is_lfs("a", text)
