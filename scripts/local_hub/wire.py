"""What lies between the socket and the routes: refuses other hosts, injects faults, counts bytes, keeps the log.

An entry is in the log before its client can have read the last byte of the answer, so that a client may ask for the log
right after its call.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import Faults, Rule
from .log import Entry, Log
from .repos import now

CONTROL = "/_local/"
# Pieces in which a slowed transfer moves, per second.
_TICKS = 10


class _CutError(Exception):
    """The connection has been closed on purpose."""


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


class _Exchange:
    """One request and its answer on their way through."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, rules: list[Rule], log: Log) -> None:
        self._scope, self._receive, self._send, self._log = scope, receive, send, log
        self.status = next((rule for rule in rules if rule.status is not None), None)
        self._cut = next((rule for rule in rules if rule.cut is not None), None)
        self._corrupt = next((rule.corrupt for rule in rules if rule.corrupt is not None), None)
        self._rate = next((rule.rate for rule in rules if rule.rate is not None), None)
        self._start: Message | None = None  # the answer's head, held back until its body begins
        self._length: int | None = None
        self._logged = False
        self._sent = 0
        self.entry = Entry(
            now(), scope["method"], scope["path"], fault=", ".join(rule.name() for rule in rules) or None
        )
        self.entry.agent = _header(scope, b"user-agent")

    def log_once(self) -> None:
        if not self._logged:
            self._logged = True
            self.entry.user = self._scope["state"].get("user")
            self._log.add(self.entry)

    async def _close(self, abort: bool) -> None:
        """Close the connection: at once, or after what is written has been sent."""
        self.log_once()
        transport: asyncio.Transport = self._scope["state"]["transport"]
        if abort:
            transport.abort()
        else:
            transport.close()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise _CutError

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            size, last = len(message.get("body", b"")), not message.get("more_body", False)
            if self._rate and size:
                await asyncio.sleep(size / self._rate)
            self.entry.bytes_in += size
            if self._cut is not None and self._cut.cut == "up" and (last or self.entry.bytes_in >= self._cut.after):
                self.entry.bytes_in = min(self.entry.bytes_in, self._cut.after)
                await self._close(abort=True)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            lengths = [value for key, value in message["headers"] if key.lower() == b"content-length"]
            self._length = int(lengths[0]) if lengths and self._scope["method"] != "HEAD" else None
            if self._cut is not None and self._cut.cut == "answer":
                await self._close(abort=True)
        elif message["type"] == "http.response.body":
            # Refusals come with a body, which the server leaves out of its answer to HEAD.
            body = b"" if self._scope["method"] == "HEAD" else bytes(message.get("body", b""))
            await self._send_body(body, message.get("more_body", False))

    async def _send_body(self, body: bytes, more: bool) -> None:
        if self._corrupt is not None and self._length:
            at = self._corrupt % self._length - self._sent
            if 0 <= at < len(body):
                body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        if self._cut is not None and self._cut.cut == "down":
            # Short answers are cut, too: never all of the body.
            stop = min(self._cut.after, self._length - 1) if self._length else 0
            if self._sent + len(body) > stop or not more:
                if self._length:
                    await self._pass_on(body[: stop - self._sent], True)
                await self._close(abort=not self._length)
        piece = max(1, self._rate // _TICKS) if self._rate else max(1, len(body))
        for at in range(0, max(1, len(body)), piece):
            part = body[at : at + piece]
            if self._rate and part:
                await asyncio.sleep(len(part) / self._rate)
            await self._pass_on(part, more or at + piece < len(body))

    async def _pass_on(self, part: bytes, more: bool) -> None:
        if self._start is not None:
            self.entry.status = self._start["status"]
        self._sent += len(part)
        self.entry.bytes_out = self._sent
        if not more or (self._length is not None and self._sent >= self._length):
            self.entry.complete = True
            self.log_once()
        if self._start is not None:
            head, self._start = self._start, None
            await self._send(head)
        await self._send({"type": "http.response.body", "body": part, "more_body": more})

    async def answer_with_status(self) -> None:
        """The fault `status`: take the request in, do nothing, answer."""
        more = True
        while more:
            message = await self.receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
        assert self.status is not None
        body = f'{{"error":"fault on demand: {self.status.status}"}}'.encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if self.status.retry_after is not None:
            headers.append((b"retry-after", str(self.status.retry_after).encode()))
        await self.send({"type": "http.response.start", "status": self.status.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


class Wire:
    """The outermost layer.

    Args:
        app: the routes.
        faults: the rules in force.
        log: where requests are recorded; those below `/_local/` are neither recorded nor faulted.
        port: of the server.
    """

    def __init__(self, app: ASGIApp, faults: Faults, log: Log, port: int) -> None:
        self._app, self._faults, self._log = app, faults, log
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # Routes see the path as it was sent: a quoted slash belongs to a name, a plain one parts names.
        raw: bytes = scope["raw_path"]
        scope = {**scope, "path": raw.decode("latin-1"), "root_path": ""}
        if _header(scope, b"host") not in self._hosts:
            # A web page elsewhere, whose name was made to point here.
            await _refuse(send)
        elif scope["path"].startswith(CONTROL):
            await self._app(scope, receive, send)
        else:
            rules = self._faults.take(scope["method"], scope["path"])
            exchange = _Exchange(scope, receive, send, rules, self._log)
            try:
                if exchange.status is not None:
                    await exchange.answer_with_status()
                else:
                    await self._app(scope, exchange.receive, exchange.send)
            except _CutError:
                return
            finally:
                exchange.log_once()


async def _refuse(send: Send) -> None:
    body = b"this hub answers to 127.0.0.1 and localhost only"
    headers: list[Any] = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 421, "headers": headers})
    await send({"type": "http.response.body", "body": body})
