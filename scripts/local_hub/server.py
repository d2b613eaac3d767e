"""The process: one store, one socket on the loopback interface."""

import asyncio
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout
from uvicorn.protocols.http.h11_impl import H11Protocol

from .accounts import Accounts
from .app import make_app
from .calls import Hub
from .faults import Faults, Rule
from .log import Log
from .signing import Signer
from .store import Store, check_folder

HOST = "127.0.0.1"


class _Protocol(H11Protocol):
    """Puts the connection within reach of a request's scope, for faults that cut it."""

    def connection_made(self, transport: Any) -> None:
        self.app_state = {**self.app_state, "transport": transport}
        super().connection_made(transport)


def _stop_when_input_ends(server: uvicorn.Server) -> None:
    def wait() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=wait, daemon=True).start()


def serve(
    folder: Path,
    accounts: Accounts,
    port: int,
    rules: list[Rule],
    ready: Callable[[str], None],
    stop_when_input_ends: bool = False,
) -> None:
    """Serve a store until interrupted.

    Args:
        folder: the store; made if missing.
        accounts: who has which token.
        port: to listen on; 0 takes a free one.
        rules: faults in force from the start.
        ready: called with the hub's URL as soon as connections are taken.
        stop_when_input_ends: end, too, when standard input does, which it does when the parent process dies.

    Raises:
        ValueError: the folder is in use by another hub, or holds something else.
        OSError: the port is taken.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another local hub is using {folder}") from error
    with lock, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        store = Store(folder)
        hub = Hub(store, accounts, Signer(store.secret()))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(128)
        port = listening.getsockname()[1]
        app = make_app(hub, Faults(rules), Log(folder / "log.jsonl"), port)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        server = uvicorn.Server(config)
        if stop_when_input_ends:
            _stop_when_input_ends(server)
        ready(f"http://{HOST}:{port}")
        asyncio.run(server.serve(sockets=[listening]))
