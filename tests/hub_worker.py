"""Processes whose huggingface_hub talks to the loopback Hub.

huggingface_hub reads `HF_ENDPOINT` and the rest when it is imported, so a client of the loopback Hub is a process of
its own. To pay for the imports once, a worker process imports the package and forks a child for every call: the
child starts with an empty state, can be killed, and several run at once.
"""

import contextlib
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Job:
    """One call in a process of its own.

    Attributes:
        pid: Of that process.
    """

    def __init__(self, pid: int, box: Path) -> None:
        self.pid = pid
        self._box = box

    def is_done(self) -> bool:
        """Whether the process has ended."""
        return (self._box / "status").exists()

    def kill(self) -> None:
        """`kill -9`; nothing happens if it has ended already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait_for_end()

    def wait_for_end(self, timeout: float = 120) -> int:
        """Wait until the process has ended; its exit status."""
        until = time.monotonic() + timeout
        while not self.is_done():
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            time.sleep(0.005)
        return int((self._box / "status").read_text())

    def result(self, timeout: float = 120) -> Any:
        """What the function returned; raises what it raised."""
        status = self.wait_for_end(timeout)
        if not (self._box / "result").exists():
            raise RuntimeError(f"process {self.pid} ended with {status} and gave no result")
        outcome, value = pickle.loads((self._box / "result").read_bytes())
        if outcome == "raised":
            raise value
        return value


class HubWorker:
    """Starts calls of functions of importable modules of tests/ in processes of their own.

    Args:
        environment: What to add to the environment; None takes a name out.
    """

    def __init__(self, environment: Mapping[str, str | None]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="hub_worker_")
        self._count = 0
        everything: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_worker"],
            cwd=ROOT,
            env={name: value for name, value in everything.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Job:
        """Call a function in a new process and do not wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        box = Path(self._scratch.name, str(self._count))
        box.mkdir()
        call = (function.__module__, function.__qualname__, args, kwargs)
        pickle.dump((str(box), call), self._process.stdin)
        self._process.stdin.flush()
        return Job(pickle.load(self._process.stdout), box)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in a new process and return what it returns, or raise what it raises."""
        return self.start(function, *args, **kwargs).result()

    def close(self) -> None:
        """End the worker; calls that still run end by themselves."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._scratch.cleanup()


def _run(box: Path, call: tuple[str, str, tuple[Any, ...], dict[str, Any]]) -> None:
    module, name, args, kwargs = call
    try:
        outcome = ("returned", getattr(importlib.import_module(module), name)(*args, **kwargs))
    except Exception as error:
        cause = f"\n(raised from {type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        error.__cause__ = error.__context__ = None
        if cause and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(cause)
        outcome = ("raised", error)
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception as error:
        data = pickle.dumps(("raised", RuntimeError(f"{outcome[1]!r} cannot be pickled: {error}")))
    (box / "result").write_bytes(data)


def _serve() -> None:
    # The channel to the parent must not be written to by anything else.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    import hf_timm_tower.timm_model  # noqa: F401  # paid for once, before the forks

    torch.set_num_threads(1)
    # What is here before the forks stays: a child that looked through it for garbage would copy it all.
    gc.freeze()
    while True:
        try:
            box, call = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            _run(Path(box), call)
            sys.stderr.flush()
            os._exit(0)
        threading.Thread(target=_reap, args=(pid, Path(box)), daemon=True).start()
        pickle.dump(pid, channel)
        channel.flush()


def _reap(pid: int, box: Path) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (box / "status.part").write_text(str(status))
    os.replace(box / "status.part", box / "status")


if __name__ == "__main__":
    _serve()
