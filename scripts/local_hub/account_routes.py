"""Routes about users, and about repositories as wholes: create, delete, settings, who may pass the gate."""

from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from . import cards, views
from .accounts import may_see, may_write
from .calls import Call, reply, route
from .errors import HubError, bad_request, forbidden, repo_not_found
from .names import KINDS, check_repo_part
from .repos import MAIN, now


def whoami(call: Call) -> Response:
    return reply(views.whoami(call.signed_in()))


def _named(call: Call) -> tuple[str, str, str]:
    """Kind, namespace and name that the body of a create or delete request gives."""
    asked = call.json()
    kind, namespace = asked.get("type") or "model", asked.get("organization") or call.signed_in().name
    if kind not in KINDS:
        raise bad_request(f"unknown repository type {kind!r:.50}")
    return kind, check_repo_part(namespace), check_repo_part(asked.get("name"))


def _is_private(asked: dict[str, Any]) -> bool | None:
    if "visibility" in asked:
        return bool(asked["visibility"] == "private")
    return bool(asked["private"]) if asked.get("private") is not None else None


def create(call: Call) -> Response:
    user = call.signed_in()
    kind, namespace, name = _named(call)
    if not may_write(user, namespace):
        raise forbidden(f"You don't have the rights to create a {kind} under the namespace {namespace!r}")
    private = bool(_is_private(call.json()))
    repos = call.hub.store.repos
    try:
        repo = repos.create(kind, namespace, name, user.name, private)
    except HubError as error:
        present = repos.get(kind, namespace, name)
        if error.status == 409 and present is not None:
            error.body["url"] = call.base + present.url_path
        raise
    return reply({"url": call.base + repo.url_path, "name": repo.id, "private": private})


def delete(call: Call) -> Response:
    user = call.signed_in()
    repo = call.hub.store.repos.get(*_named(call))
    if repo is None or not may_see(user, repo):
        raise repo_not_found(user.name)
    if not may_write(user, repo.namespace):
        raise forbidden(f"Your token may not delete {repo.id}")
    call.hub.store.repos.delete(repo)
    return reply({"success": True})


def change_settings(call: Call) -> Response:
    repo, asked = call.writable_repo(), call.json()
    changes: dict[str, object] = {}
    private = _is_private(asked)
    if private is not None:
        changes["private"] = private
    if "gated" in asked:
        if asked["gated"] not in (False, "auto", "manual"):
            raise bad_request('"gated" must be false, "auto" or "manual"')
        changes["gated"] = asked["gated"]
    repo.change_settings(**changes)
    settings = repo.settings()
    return reply({"private": settings.private, "gated": settings.gated})


def _asked_user(call: Call) -> str:
    name = call.json().get("user")
    if not isinstance(name, str) or not call.hub.accounts.exists(name):
        raise HubError(404, "User not found")
    return name


def grant_access(call: Call) -> Response:
    repo, name = call.writable_repo(), _asked_user(call)
    with repo.lock:
        settings = repo.settings()
        if not settings.gated:
            raise bad_request("The repository is not gated")
        if name in settings.granted:
            raise bad_request("The user already has access")
        repo.change_settings(granted=(*settings.granted, name))
    return reply({"success": True})


def handle_access(call: Call) -> Response:
    """Accepting grants access; every other answer takes it away."""
    repo, name = call.writable_repo(), _asked_user(call)
    with repo.lock:
        others = tuple(user for user in repo.settings().granted if user != name)
        repo.change_settings(granted=(*others, name) if call.json().get("status") == "accepted" else others)
    return reply({"success": True})


def list_access(call: Call) -> Response:
    names = call.writable_repo().settings().granted if call.params["status"] == "accepted" else ()
    return reply(
        [
            {"requestId": name, "user": {"user": name, "fullname": name}, "status": "accepted", "timestamp": now()}
            for name in names
        ]
    )


def list_repos(call: Call) -> Response:
    found = []
    for repo in call.hub.store.repos.all(call.kind()):
        wanted = call.query.get("author") in (None, repo.namespace)
        if wanted and call.query.get("search", "").lower() in repo.id.lower() and may_see(call.user, repo):
            found.append(views.repo_info(call.hub.store.objects, repo, repo.resolve(MAIN), False, ()))
    limit = call.query.get("limit", "")
    return reply(found[: int(limit)] if limit.isdecimal() else found)


def validate_card(call: Call) -> Response:
    content = call.json().get("content")
    if not isinstance(content, str):
        raise bad_request('"content" must be a string')
    try:
        metadata = cards.parse(content)
    except ValueError as error:
        return reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
    wrong = cards.problems(metadata)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    answer = {"errors": [{"message": message} for message in wrong], "warnings": warnings}
    return reply(answer, 400 if wrong else 200)


def telemetry(call: Call) -> Response:
    return Response()


def agent_harnesses(call: Call) -> Response:
    """The client asks, once a day, by which signs it knows programs that act for people. Here it knows none."""
    return reply({"standardEnvVars": [], "harnesses": {}})


def no_xet(call: Call) -> Response:
    raise HubError(501, "This hub has no Xet storage: set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported")


_REPO = "/api/{kinds}/{namespace}/{name}"
ROUTES = [
    Route("/api/whoami-v2", route(whoami)),
    Route("/api/repos/create", route(create), methods=["POST"]),
    Route("/api/repos/delete", route(delete), methods=["DELETE"]),
    Route("/api/validate-yaml", route(validate_card), methods=["POST"]),
    Route("/api/telemetry/{topic:path}", route(telemetry)),
    Route("/api/agent-harnesses", route(agent_harnesses)),
    Route("/api/{kinds}", route(list_repos)),
    Route(_REPO + "/settings", route(change_settings), methods=["PUT"]),
    Route(_REPO + "/user-access-request/grant", route(grant_access), methods=["POST"]),
    Route(_REPO + "/user-access-request/handle", route(handle_access), methods=["POST"]),
    Route(_REPO + "/user-access-request/{status}", route(list_access)),
    Route(_REPO + "/xet-read-token/{revision}", route(no_xet)),
    Route(_REPO + "/xet-write-token/{revision}", route(no_xet)),
]
