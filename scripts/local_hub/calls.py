"""One request with everything a route needs: who asks, the path's parts decoded exactly once, query and body."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .accounts import Accounts, User, may_download, may_see, may_write
from .errors import HubError, bad_request, forbidden, gated, repo_not_found
from .names import KINDS
from .repos import Repo
from .signing import Signer
from .store import Store

# A commit's regular files come in its body.
_LARGEST_BODY = 256 * 1024 * 1024


@dataclass(frozen=True)
class Hub:
    """What all routes share."""

    store: Store
    accounts: Accounts
    signer: Signer


def decode(part: str) -> str:
    """A part of a raw path as the client meant it. Raises HubError 400 if it is not UTF-8."""
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError as error:
        raise bad_request("the path is not UTF-8") from error


@dataclass(frozen=True)
class Call:
    """A request.

    Args:
        hub: what all routes share.
        user: who asks, or None.
        path: raw path.
        params: parts of the path, decoded.
        query: decoded query.
        headers: the request's.
        body: the request's, whole.
        base: this hub as the client calls it, "http://host:port".
        storage_base: the same port under the host's other name: for the client another site, as the Hub's storage is.
    """

    hub: Hub
    user: User | None
    path: str
    params: dict[str, str]
    query: QueryParams
    headers: Headers
    body: bytes
    base: str
    storage_base: str

    def flag(self, name: str) -> bool:
        """Whether the query has `name` as something that means yes."""
        return self.query.get(name, "").lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        """The body, a JSON object. Raises HubError 400 otherwise."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise bad_request("the body is not JSON") from error
        if not isinstance(found, dict):
            raise bad_request("the body is not a JSON object")
        return found

    def form(self) -> dict[str, list[str]]:
        """The body, JSON or form: key -> values."""
        if "json" in self.headers.get("content-type", ""):
            return {k: [str(v) for v in (x if isinstance(x, list) else [x])] for k, x in self.json().items()}
        try:
            return parse_qs(self.body.decode(), keep_blank_values=True)
        except ValueError as error:
            raise bad_request("the body is not a form") from error

    def signed_in(self) -> User:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def kind(self) -> str:
        """The type of repository that the path speaks of: models where it names none. HubError 404 for other words."""
        kinds = self.params.get("kinds", "models")
        if kinds not in [f"{kind}s" for kind in KINDS]:
            raise HubError(404, f"This local hub does not know {self.path:.200}")
        return kinds.removesuffix("s")

    def repo(self) -> Repo:
        """The repository that the path names, if the caller may know of it; else HubError 401 or 404."""
        repo = self.hub.store.repos.get(self.kind(), self.params["namespace"], self.params["name"])
        if repo is None or not may_see(self.user, repo):
            raise repo_not_found(self.user.name if self.user else None)
        return repo

    def readable_repo(self) -> Repo:
        """`repo` whose files the caller may read; else also HubError 401 or 403 for a closed gate."""
        repo = self.repo()
        if not may_download(self.user, repo):
            raise gated(self.user.name if self.user else None, repo.kind, repo.id, self.base)
        return repo

    def writable_repo(self) -> Repo:
        """`repo` if the caller may change it; else also HubError 401 or 403."""
        repo = self.repo()
        self.signed_in()
        if not may_write(self.user, repo.namespace):
            raise forbidden(f"Your token does not have write access to {repo.id}")
        return repo


def _bases(request: Request) -> tuple[str, str]:
    host = request.headers.get("host", "")
    name, _, port = host.rpartition(":")
    other = "localhost" if name == "127.0.0.1" else "127.0.0.1"
    return f"http://{host}", f"http://{other}:{port}"


async def read_call(request: Request, with_body: bool = True) -> Call:
    """Gather a Call. Raises HubError 401 for a wrong token, 413 for a body beyond all measure."""
    hub: Hub = request.app.state.hub
    user = hub.accounts.by_header(request.headers.get("authorization"))
    request.state.user = user.name if user else None
    body = bytearray()
    if with_body:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LARGEST_BODY:
                raise HubError(413, f"The request's body exceeds {_LARGEST_BODY} bytes")
    base, storage_base = _bases(request)
    return Call(
        hub=hub,
        user=user,
        path=request.scope["path"],
        params={name: decode(part) for name, part in request.path_params.items()},
        query=request.query_params,
        headers=request.headers,
        body=bytes(body),
        base=base,
        storage_base=storage_base,
    )


def route(answer: Callable[[Call], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Make a plain function of a Call, run in a thread since it uses the disk, into an endpoint."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(answer, await read_call(request))

    endpoint.__name__ = answer.__name__
    return endpoint


def reply(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; dates and the like, which YAML knows and JSON does not, become text."""
    return JSONResponse(json.loads(json.dumps(value, default=str)), status, headers)
