"""The application: all routes, and how refusals become answers."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from .account_routes import ROUTES as ACCOUNT_ROUTES
from .calls import Hub
from .control_routes import control_routes
from .errors import HubError
from .faults import Faults
from .file_routes import ROUTES as FILE_ROUTES
from .log import Log
from .repo_routes import ROUTES as REPO_ROUTES
from .wire import Wire


def _printable(text: str) -> str:
    # Headers hold printable ASCII, and a message may quote what a client sent.
    safe = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in safe)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    headers = {"X-Error-Message": _printable(error.message), **error.headers}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
    return JSONResponse({"error": error.message, **error.body}, error.status, headers)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"This local hub does not know {request.method} {request.scope['path']:.200}"
    return await _refusal(request, HubError(error.status_code, message))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def make_app(hub: Hub, faults: Faults, log: Log, port: int) -> ASGIApp:
    """The ASGI application of a hub on `port`."""
    app = Starlette(
        routes=[*control_routes(faults, log), *FILE_ROUTES, *ACCOUNT_ROUTES, *REPO_ROUTES],
        exception_handlers={HubError: _refusal, HTTPException: _unknown, ClientDisconnect: _gone},
    )
    app.router.redirect_slashes = False
    app.state.hub = hub
    return Wire(app, faults, log, port)
