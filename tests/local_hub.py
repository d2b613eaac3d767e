"""A Hub of the tests' own: scripts/local_hub in a process of its own, on a free port of this machine.

    with LocalHub(tmp_path / "hub", users={"ann": "hf_ann", "bob": "hf_bob"}) as hub:
        fresh_process(code, env=hub.env(tmp_path / "cache"))
        assert hub.uploaded() == ...

Clients read `HF_ENDPOINT` when they are imported, so code that talks to the hub runs in a process with `env`.
"""

import json
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "local_hub"
# Requests to the hub itself, whatever proxy the machine has.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LocalHub:
    """A running hub; a context manager. It ends with the test's process, however that ends.

    Args:
        store: the folder it keeps; made if missing. The same folder again is the same hub.
        users: name -> token that may write; the first is who `env` and `token` speak for.
        readers: name -> token that may only read.
        orgs: organisation -> its members.
        faults: rules in force from the start, as `--fault` takes them.
    """

    def __init__(
        self,
        store: Path,
        users: Mapping[str, str] | None = None,
        readers: Mapping[str, str] | None = None,
        orgs: Mapping[str, Iterable[str]] | None = None,
        faults: Iterable[str] = (),
    ) -> None:
        self.store = store
        self.users = dict(users or {"ann": "hf_ann"})
        self.user, self.token = next(iter(self.users.items()))
        self._options = [f"--token={name}={token}" for name, token in self.users.items()]
        self._options += [f"--read-token={name}={token}" for name, token in (readers or {}).items()]
        self._options += [f"--org={name}={','.join(members)}" for name, members in (orgs or {}).items()]
        self._faults = list(faults)
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self._log_start = 0
        self._stderr = store.with_name(f"{store.name}.{secrets.token_hex(4)}.stderr")

    def __enter__(self) -> "LocalHub":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()
        complaints = self.complaints()
        if kind is None and complaints:
            raise AssertionError(f"the local hub itself failed:\n{complaints}")

    def complaints(self) -> str:
        """What the hub wrote on its standard error: nothing, unless it has a fault that nobody asked for."""
        return self._stderr.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the hub is not running"
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the port that it had before if it had one, and wait until it answers."""
        assert self._process is None, "the hub is running"
        command = [sys.executable, str(_SCRIPT), f"--store={self.store}", f"--port={self.port}", "--until-input-ends"]
        command += [*self._options, *(f"--fault={words}" for words in self._faults)]
        self._stderr.parent.mkdir(parents=True, exist_ok=True)
        with self._stderr.open("a") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first.startswith("export HF_ENDPOINT="):
            self.kill()
            raise RuntimeError(f"the local hub did not start: {first}{self.complaints()}")
        self.port = int(first.rpartition(":")[2])
        self._log_start = 0

    def kill(self) -> None:
        """SIGKILL: nothing is put in order. No effect if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def _end(self) -> None:
        assert self._process is not None, "the hub is not running"
        self._process.communicate(timeout=30)
        self._process = None

    def stop(self) -> None:
        """End it as Ctrl-C or the end of its parent does, after the requests in flight."""
        self._end()

    def restart(self) -> None:
        """`stop` and `start` with the same store on the same port; the log and the faults begin anew."""
        self.stop()
        self.start()

    def env(self, cache: Path, token: str | None = "") -> dict[str, str | None]:
        """What to add to the environment of a client's process.

        Args:
            cache: the client's `HF_HOME`.
            token: its `HF_TOKEN`; the first user's by default, None for none.

        Returns:
            Name -> value; None is a name to take out.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": self.token if token == "" else token,
            "HF_TOKEN_PATH": str(cache / "token"),
            "HUGGING_FACE_HUB_TOKEN": None,
            "HF_HUB_CACHE": str(cache / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def _ask(self, path: str, method: str = "GET", value: object = None) -> Any:
        body = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        with _DIRECT.open(request, timeout=30) as answer:
            return json.loads(answer.read())

    def faults(self, *rules: dict[str, Any]) -> None:
        """Put these rules in place of all before (see scripts/local_hub/faults.py); none clears."""
        self._ask("/_local/faults", "PUT", list(rules))

    def rules(self) -> list[dict[str, Any]]:
        """The rules in force; `met` of each says how many requests had the fault."""
        found: list[dict[str, Any]] = self._ask("/_local/faults")
        return found

    def log(self) -> list[dict[str, Any]]:
        """The requests since the start or the last `forget`, in the order in which they ended."""
        found: list[dict[str, Any]] = self._ask(f"/_local/log?since={self._log_start}")
        return found

    def forget(self) -> None:
        """Let `log` begin here."""
        self._log_start += len(self.log())

    def uploaded(self) -> dict[str, int]:
        """sha256 -> bytes of each LFS object that a client sent, since `log` begins."""
        puts = [entry for entry in self.log() if entry["method"] == "PUT" and entry["path"].startswith("/_storage/")]
        found: dict[str, int] = {}
        for entry in puts:
            sha256 = entry["path"].rpartition("/")[2]
            found[sha256] = found.get(sha256, 0) + entry["bytes_in"]
        return found

    def downloaded(self) -> dict[str, int]:
        """Path -> bytes of each file that was sent to a client, since `log` begins; LFS objects as `/_storage/...`."""
        found: dict[str, int] = {}
        for entry in self.log():
            if entry["method"] == "GET" and ("/resolve/" in entry["path"] or entry["path"].startswith("/_storage/")):
                if entry["bytes_out"]:
                    found[entry["path"]] = found.get(entry["path"], 0) + entry["bytes_out"]
        return found

    def object_path(self, sha256: str) -> Path:
        """The file in the store that holds an LFS object."""
        return self.store / "lfs" / sha256[:2] / sha256
