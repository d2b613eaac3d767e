"""What client processes of the loopback Hub do (`hub_worker`): build, push, load, and say what they have."""

import hashlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import HfApi

from hf_timm_tower import TimmModel

TRUNK = "test_resnet"
WIDTH = 24


class TestHead(nn.Module):
    """A head as people write them."""

    __test__ = False

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, 32)
        self.out = nn.Linear(32, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(x)))


def make(seed: int, trunk_name: str = TRUNK) -> TimmModel:
    """A small tower; another seed gives other weights everywhere."""
    torch.manual_seed(seed)
    return TimmModel(trunk_name, embed_dim=WIDTH, custom_head=TestHead).eval()


def numbers(tower: nn.Module) -> str:
    """A digest of all weights and of an embedding."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    with torch.no_grad():
        digest.update(tower(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)).numpy().tobytes())
    return digest.hexdigest()


def numbers_of(seed: int) -> str:
    """The numbers of a tower that nobody pushed yet."""
    return numbers(make(seed))


def push(repo_id: str, seed: int, trunk_name: str = TRUNK, **kwargs: Any) -> tuple[str, str]:
    """Push a tower; (the address that push_to_hub gave, the tower's numbers)."""
    tower = make(seed, trunk_name)
    return tower.push_to_hub(repo_id, **kwargs), numbers(tower)


def load(repo_id: str, **kwargs: Any) -> str:
    """Load a tower; its numbers."""
    return numbers(TimmModel.from_pretrained(repo_id, **kwargs))


def save(seed: int, folder: str) -> str:
    """Save a tower; its numbers."""
    tower = make(seed)
    tower.save_pretrained(folder)
    return numbers(tower)


def load_with_sockets_blocked(repo_id: str) -> str:
    """Load a tower where any attempt to reach the network ends the process's attempt with an error."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked for")

    socket.socket.connect = refuse
    socket.create_connection = refuse
    return load(repo_id, local_files_only=True)


def push_head_on(repo_id: str, base: str, seed: int, **kwargs: Any) -> tuple[str, str]:
    """Another head on the trunk of a tower of the Hub, pushed without the trunk."""
    tower = TimmModel.from_pretrained(base)
    torch.manual_seed(seed)
    tower.head = TestHead(tower.config.num_features, WIDTH)
    return tower.push_to_hub(repo_id, trunk=base, **kwargs), numbers(tower)


class ByValue(nn.Module):
    """Which way it goes depends on the values: no graph can hold it."""

    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -2 * y


def push_code_head(repo_id: str, **kwargs: Any) -> tuple[str, str]:
    """Push a tower whose head can only be stored as code."""
    torch.manual_seed(1)
    tower = TimmModel(TRUNK, embed_dim=WIDTH, custom_head=ByValue).eval()
    return tower.push_to_hub(repo_id, **kwargs), numbers(tower)


def load_in_new_process(repo_id: str, cache: str, **kwargs: Any) -> str:
    """Load where this module, and so the head's class, cannot be imported."""
    import sys

    sys.modules.pop("tests.hub_calls")
    sys.path[:] = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry or ".", "tests"))]
    return load(repo_id, cache_dir=cache, **kwargs)


def push_timm(repo_id: str, seed: int) -> None:
    """A repository as timm itself writes it."""
    import timm

    torch.manual_seed(seed)
    timm.models.push_to_hf_hub(timm.create_model(TRUNK), repo_id, safe_serialization=True)


def push_head_on_timm(repo_id: str, base: str, seed: int) -> tuple[str, str]:
    """A head on the trunk of a timm repository, pushed without the trunk."""
    import timm

    trunk = timm.create_model(f"hf-hub:{base}", pretrained=True)
    torch.manual_seed(seed)
    tower = TimmModel.from_trunk(trunk, embed_dim=WIDTH, custom_head=TestHead).eval()
    return tower.push_to_hub(repo_id, trunk=base), numbers(tower)


def load_often(repo_id: str, times: int, cache: str) -> list[str]:
    """Load a tower several times, each time as it is on the Hub then; its numbers."""
    return [load(repo_id, cache_dir=cache) for _ in range(times)]


def train_head_and_push(repo_id: str, seed: int, part: str = "head", source: str | None = None, **kwargs: Any) -> str:
    """Load a tower, change its head (or another part) as training does, push it again; the new numbers."""
    tower = TimmModel.from_pretrained(source or repo_id)
    _change(tower.get_submodule(part), seed)
    tower.push_to_hub(repo_id, **kwargs)
    return numbers(tower)


def train_and_push_face(repo_id: str, seed: int, part: str = "head", source: str | None = None, **kwargs: Any) -> str:
    """The same by the transformers model of a tower."""
    from hf_timm_tower import TimmTowerModel

    model = TimmTowerModel.from_pretrained(source or repo_id)
    _change(model.get_submodule(part), seed)
    model.push_to_hub(repo_id, **kwargs)
    return numbers(TimmModel.from_pretrained(repo_id))


def train_head_and_save_with_push(repo_id: str, seed: int, source: str | None = None) -> str:
    """As `train_head_and_push`, by `save_pretrained(push_to_hub=True)`."""
    tower = TimmModel.from_pretrained(source or repo_id)
    return _save_with_push(tower, repo_id, seed)


def train_face_and_save_with_push(repo_id: str, seed: int, source: str | None = None) -> str:
    """The same by the transformers model of a tower."""
    from hf_timm_tower import TimmTowerModel

    return _save_with_push(TimmTowerModel.from_pretrained(source or repo_id), repo_id, seed)


def _save_with_push(model: Any, repo_id: str, seed: int) -> str:
    _change(model.head, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, push_to_hub=True, repo_id=repo_id)
        assert not list(Path(folder).glob("trunk*.safetensors"))
    return numbers(TimmModel.from_pretrained(repo_id))


def train_head_and_upload_folder(repo_id: str, seed: int, source: str | None = None) -> str:
    """The same by `save_pretrained`, and `upload_folder` of what it wrote."""
    return _save_and_upload(TimmModel.from_pretrained(source or repo_id), repo_id, seed)


def train_face_and_upload_folder(repo_id: str, seed: int, source: str | None = None) -> str:
    """The same by the transformers model of a tower, as `Trainer(push_to_hub=True)` does it."""
    from hf_timm_tower import TimmTowerModel

    return _save_and_upload(TimmTowerModel.from_pretrained(source or repo_id), repo_id, seed)


def _save_and_upload(model: Any, repo_id: str, seed: int) -> str:
    _change(model.head, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert numbers(TimmModel.from_pretrained(folder)) != ""
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
        model.save_pretrained(folder, trunk=False)
        assert Path(folder, "trunk.safetensors").is_file()
    return numbers(TimmModel.from_pretrained(repo_id))


def _change(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def push_saved(folder: str, repo_id: str, names: list[str]) -> str:
    """Push named files of a folder."""
    from hf_timm_tower.hub.push import PushOptions, push_folder

    return push_folder(Path(folder), repo_id, lambda name, card: f"# {name} {card}\n", names, PushOptions())


def push_files(repo_id: str, files: dict[str, bytes], **kwargs: Any) -> str:
    """Make a repository of files as they are; the commit."""
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message="files", **kwargs).oid)


def read_files(repo_id: str, names: list[str], revision: str | None = None) -> dict[str, bytes]:
    """Files of a repository, by the client's own download."""
    from huggingface_hub import hf_hub_download

    return {name: Path(hf_hub_download(repo_id, name, revision=revision)).read_bytes() for name in names}


def list_files(repo_id: str, revision: str | None = None) -> list[str]:
    """Names of a repository's files."""
    return sorted(HfApi().list_repo_files(repo_id, revision=revision))


def api(method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of HfApi."""
    return getattr(HfApi(token=kwargs.pop("api_token", None)), method)(*args, **kwargs)


def files_of(folder: str) -> dict[str, bytes]:
    """All files of a folder."""
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def cached_blobs(cache: str) -> list[str]:
    """Names of all blobs in a cache."""
    return sorted(path.name for path in Path(cache).rglob("blobs/*") if os.path.isfile(path))


@dataclass(frozen=True)
class Watched:
    """What loading a repository did.

    Attributes:
        outcome: The tower's numbers, or the error.
        verified: Status of `verify()`, where it loaded.
        harm: Code of the cache that ran, files written outside of it, processes started.
        seconds: Of this process's CPU.
        bytes_more: Memory at its peak, less that before.
    """

    outcome: str | Exception
    verified: str | None
    harm: list[str]
    seconds: float
    bytes_more: int


class Watcher:
    """An audit hook that notes what loading must not do."""

    def __init__(self, cache: Path) -> None:
        self.cache = os.path.realpath(cache)
        self.harm: list[str] = []
        sys.dont_write_bytecode = True  # which is no harm, but is written
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "exec" and self._is_inside(getattr(args[0], "co_filename", "")):
            self.harm.append(f"code of the cache: {args[0].co_filename}")
        elif event == "open":
            mode, flags = args[1], args[2]
            for_writing = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
            if for_writing:
                self._written(args[0], -1)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            self._written(args[0], args[-1])
        elif event in ("os.truncate", "shutil.rmtree"):
            self._written(args[0], -1)
        elif event in ("os.rename", "os.symlink", "os.link"):
            self._written(args[1], args[-1])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork"):
            self.harm.append(f"process: {event} {args!r:.100}")

    def _is_inside(self, path: object) -> bool:
        return isinstance(path, str) and os.path.realpath(path).startswith(self.cache + os.sep)

    def _written(self, path: object, folder: int) -> None:
        """Note a path that is changed, relative to an open folder unless that is -1."""
        if not isinstance(path, (str, bytes, os.PathLike)) or os.fspath(path) == os.devnull:
            return
        full = os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else "", os.fsdecode(path))
        if not self._is_inside(full) and os.path.realpath(full) != self.cache:
            self.harm.append(f"written outside: {full}")


def load_watched(repo_id: str, cache: str) -> Watched:
    """Load a repository of a stranger and watch it."""
    os.makedirs(cache, exist_ok=True)
    watcher = Watcher(Path(cache))
    verified = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    watcher.harm.clear()
    before, started = _memory("VmRSS"), time.process_time()
    outcome: str | Exception
    try:
        tower = TimmModel.from_pretrained(repo_id, cache_dir=cache)
        outcome = numbers(tower)
        verified = tower.verify().status if tower._fingerprint is not None else None
    except Exception as error:
        error.__traceback__ = None
        outcome = error
    seconds = time.process_time() - started
    harm = list(watcher.harm)
    if "TOWER_TEST_EVIL" in os.environ:
        harm.append(os.environ["TOWER_TEST_EVIL"])
    return Watched(outcome, verified, harm, seconds, _memory("VmHWM") - before)


def watch_harm(cache: str, outside: str) -> list[str]:
    """Do what loading must not do, under the watcher."""
    os.makedirs(cache)
    watcher = Watcher(Path(cache))
    Path(cache, "evil.py").write_text("x = 1")
    exec(compile("x = 1", os.path.join(cache, "evil.py"), "exec"))
    Path(outside).write_text("x")
    os.system("true")
    return watcher.harm


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")
