"""The demo on a Hub: the loopback Hub of this repository, started here, or the real one."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
LOCAL_REPO = "demo/digits-tower"


class HubStepFailed(Exception):
    """A step on the Hub did not do what it promises; the message says which."""


@dataclass(frozen=True)
class Hub:
    """Where the demo publishes.

    Attributes:
        environment: For the client's processes.
        url: Of a loopback Hub, None for the real one.
    """

    environment: dict[str, str]
    url: str | None

    def bytes_received(self) -> int | None:
        """Bytes of large files that were uploaded to the loopback Hub so far, by its own log."""
        if self.url is None:
            return None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.url}/_local/log") as answer:
            log = json.load(answer)
        return sum(entry["bytes_in"] for entry in log if entry["method"] == "PUT")


@contextmanager
def loopback_hub(store: Path) -> Iterator[Hub]:
    """A Hub of this machine's own, empty at first, for as long as the block runs.

    Raises:
        HubStepFailed: it does not start.
    """
    token = "hf_demo"
    command = [sys.executable, str(HERE.parent / "local_hub"), f"--store={store}", "--port=0", "--until-input-ends"]
    process = subprocess.Popen(
        [*command, f"--token=demo={token}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        url = first.removeprefix("export HF_ENDPOINT=")
        if url == first:
            raise HubStepFailed(f"the loopback Hub did not start: {first or 'see above'}")
        environment = {
            "HF_ENDPOINT": url,
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        yield Hub(environment, url)
    finally:
        process.communicate(timeout=30)


def real_hub() -> Hub:
    """The Hub that huggingface_hub talks to by itself, with the user's own token."""
    return Hub({"HF_HUB_OFFLINE": "0"}, None)


def publish(hub: Hub, repo_id: str, folder: Path, embeddings: dict[str, torch.Tensor]) -> None:
    """Push a saved tower, load it by its id into an empty cache, fine-tune its head, push again.

    Args:
        hub: Where to.
        repo_id: `org/name`.
        folder: The saved tower.
        embeddings: What the tower gives, by group of images; the loaded one must give the same bits.

    Raises:
        HubStepFailed: a process failed, bits differ, or bytes of the trunk were sent twice.
    """
    trunk, head = ((folder / f"{part}.safetensors").stat().st_size for part in ("trunk", "head"))
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch, "embeddings.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in embeddings.items()}, expected)
        received = hub.bytes_received()
        first = _step(hub, "push", repo_id, folder, Path(scratch))
        received = _report("first push", first, hub, received)
        second = _step(hub, "tune", repo_id, expected, Path(scratch))
        came_back = "equal" if second["equal"] else "DIFFERENT"
        print(f"  loaded by its id in a fresh process with an empty cache: {came_back}")
        print(f"  head fine-tuned there: classifier {second['accuracy']:.1%} on the held-out digits")
        _report("second push", second, hub, received)
    if not second["equal"]:
        raise HubStepFailed(f"{repo_id}, loaded by its id, gives other bits than the tower that was pushed")
    if second["new"] != head:
        raise HubStepFailed(f"the second push sent {second['new']} bytes; the head has {head}, the trunk {trunk}")


def _report(what: str, found: dict[str, Any], hub: Hub, before: int | None) -> int | None:
    received = hub.bytes_received()
    by_log = "" if received is None or before is None else f" ({received - before:,} by the Hub's log)"
    print(f"  {what}: {found['new']:>10,} bytes of weights uploaded{by_log}   {found['url']}")
    return received


def _step(hub: Hub, step: str, repo_id: str, given: Path, scratch: Path) -> dict[str, Any]:
    result = scratch / f"{step}.json"
    command = [sys.executable, str(HERE / "publish.py"), step, repo_id, str(result), str(given.resolve())]
    cache = {"HF_HUB_CACHE": str(scratch / f"cache-{step}")}
    done = subprocess.run(command, cwd=scratch, env={**os.environ, **hub.environment, **cache}, check=False)
    if done.returncode:
        raise HubStepFailed(f"the process to {step} {repo_id} failed (exit status {done.returncode}); see above")
    found: dict[str, Any] = json.loads(result.read_text())
    return found
