"""Routes about what is in a repository: info, trees, history, refs, and commits to it."""

from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response
from starlette.routing import Route

from . import commits, views
from .accounts import User
from .calls import Call, reply, route
from .errors import bad_request, entry_not_found, forbidden, repo_not_found
from .names import check_path, check_ref_name
from .repos import MAIN, Repo

# Entries in one answer, as on the Hub; more come in further pages.
_PAGE, _PAGE_EXPANDED, _PAGE_COMMITS = 1000, 50, 50


def _page(call: Call, items: list[Any], default: int) -> Response:
    """One page of a list, with a link to the next."""
    limit, cursor = call.query.get("limit", ""), call.query.get("cursor", "")
    size = max(1, min(int(limit), default)) if limit.isdecimal() else default
    start = int(cursor) if cursor.isdecimal() else 0
    headers = {"X-Total-Count": str(len(items))}
    if start + size < len(items):
        others = [(key, value) for key, value in call.query.multi_items() if key != "cursor"]
        query = urlencode([*others, ("cursor", str(start + size))])
        headers["Link"] = f'<{call.base}{call.path}?{query}>; rel="next"'
    return reply(items[start : start + size], headers=headers)


def info(call: Call) -> Response:
    repo = call.repo()
    commit = repo.resolve(call.params.get("revision", MAIN))
    expand = [*call.query.getlist("expand"), *call.query.getlist("expand[]")]
    return reply(views.repo_info(call.hub.store.objects, repo, commit, call.flag("blobs"), expand))


def tree(call: Call) -> Response:
    repo = call.repo()
    commit, folder = repo.resolve(call.params["revision"]), call.params.get("path", "").strip("/")
    expand = call.flag("expand")
    found = views.entries(repo, commit, expand)
    if folder and found.get(check_path(folder), {}).get("type") != "directory":
        raise entry_not_found(folder, commit.id, f"{folder} does not exist on {call.params['revision']!r}")
    start = f"{folder}/" if folder else ""
    inside = [path for path in sorted(found) if path.startswith(start)]
    if not call.flag("recursive"):
        inside = [path for path in inside if "/" not in path[len(start) :]]
    return _page(call, [found[path] for path in inside], _PAGE_EXPANDED if expand else _PAGE)


def paths_info(call: Call) -> Response:
    repo, form = call.repo(), call.form()
    commit = repo.resolve(call.params["revision"])
    expand = form.get("expand", [""])[-1].lower() in ("true", "1")
    found = views.entries(repo, commit, expand)
    return reply([found[path] for path in form.get("paths", []) if path in found])


def history(call: Call) -> Response:
    repo = call.repo()
    found = [views.commit_entry(commit) for commit in repo.history(repo.resolve(call.params["revision"]))]
    return _page(call, found, _PAGE_COMMITS)


def refs(call: Call) -> Response:
    repo = call.repo()
    found = {"branches": views.ref_entries(repo, "heads"), "converts": [], "tags": views.ref_entries(repo, "tags")}
    if call.flag("include_prs"):
        found["pullRequests"] = views.ref_entries(repo, "pr")
    return reply(found)


def create_branch(call: Call) -> Response:
    repo, name = call.writable_repo(), check_ref_name(call.params["ref"])
    start = (call.json() if call.body else {}).get("startingPoint", MAIN)
    if not isinstance(start, str):
        raise bad_request('"startingPoint" must be a string')
    repo.create_ref("heads", name, repo.resolve(start).id)
    return reply({"success": True}, 201)


def delete_branch(call: Call) -> Response:
    call.writable_repo().delete_ref("heads", call.params["ref"])
    return reply({"success": True})


def create_tag(call: Call) -> Response:
    repo = call.writable_repo()
    repo.create_ref("tags", check_ref_name(call.json().get("tag")), repo.resolve(call.params["ref"]).id)
    return reply({"success": True}, 201)


def delete_tag(call: Call) -> Response:
    call.writable_repo().delete_ref("tags", call.params["ref"])
    return reply({"success": True})


def preupload(call: Call) -> Response:
    repo, asked = call.repo(), call.json()
    call.signed_in()
    commit = repo.resolve(call.params["revision"])
    files, ignore = asked.get("files"), asked.get("gitIgnore")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise bad_request('"files" must be a list of objects')
    if ignore is not None and not isinstance(ignore, str):
        raise bad_request('"gitIgnore" must be a string')
    plan = commits.upload_plan(call.hub.store.objects, commit, files, ignore)
    return reply({"files": plan, "commitOid": commit.id})


def _may_commit(user: User, repo: Repo, revision: str) -> bool:
    """The author of a pull request may add to it; all else is for those with write access."""
    if user.role != "write":
        return False
    opened = repo.ref("pr", revision.removeprefix("refs/pr/")) if revision.startswith("refs/pr/") else None
    return user.owns(repo.namespace) or (opened is not None and repo.commit(opened).author == user.name)


def commit(call: Call) -> Response:
    repo, user, create_pr = call.repo(), call.signed_in(), call.flag("create_pr")
    revision = call.params["revision"]
    if not (user.role == "write" if create_pr else _may_commit(user, repo, revision)):
        raise forbidden(f"Your token does not have write access to {repo.id}; try create_pr=1")
    request = commits.parse(call.body)
    made, number = commits.commit(call.hub.store.objects, repo, revision, request, user.name, create_pr)
    page = call.base + repo.url_path
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{page}/commit/{made.id}", "hookOutput": ""}
    if number is not None:
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    return reply(answer)


def no_such_repo(call: Call) -> Response:
    """Repositories without a namespace, which some clients still ask for: there are none here."""
    raise repo_not_found(call.user.name if call.user else None)


_REPO = "/api/{kinds}/{namespace}/{name}"
ROUTES = [
    Route(_REPO, route(info)),
    Route(_REPO + "/revision/{revision}", route(info)),
    Route(_REPO + "/tree/{revision}", route(tree)),
    Route(_REPO + "/tree/{revision}/{path:path}", route(tree)),
    Route(_REPO + "/paths-info/{revision}", route(paths_info), methods=["POST"]),
    Route(_REPO + "/commits/{revision}", route(history)),
    Route(_REPO + "/refs", route(refs)),
    Route(_REPO + "/branch/{ref}", route(create_branch), methods=["POST"]),
    Route(_REPO + "/branch/{ref}", route(delete_branch), methods=["DELETE"]),
    Route(_REPO + "/tag/{ref}", route(create_tag), methods=["POST"]),
    Route(_REPO + "/tag/{ref}", route(delete_tag), methods=["DELETE"]),
    Route(_REPO + "/preupload/{revision}", route(preupload), methods=["POST"]),
    Route(_REPO + "/commit/{revision}", route(commit), methods=["POST"]),
    Route("/api/{kinds}/{name}", route(no_such_repo)),
    Route("/api/{kinds}/{name}/revision/{revision}", route(no_such_repo)),
    Route("/{name}/resolve/{revision}/{path:path}", route(no_such_repo)),
]
