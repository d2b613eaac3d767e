"""Routes that move file contents: resolve, the storage it redirects to, and LFS uploads."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from .accounts import may_write
from .calls import Call, read_call, reply, route
from .errors import HubError, bad_request, entry_not_found, forbidden
from .names import check_path, check_sha256
from .repos import Repo

_LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def _whole_or_not_modified(call: Call, path: Any, etag: str, headers: dict[str, str]) -> Response:
    if call.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"ETag": etag, **headers})
    # Starlette answers Range and HEAD.
    return FileResponse(path, headers={"ETag": etag, **headers}, media_type="application/octet-stream")


def resolve(call: Call) -> Response:
    """A file at a revision: a regular one as it is, an LFS one by a redirect to the storage."""
    repo = call.readable_repo()
    commit, path = repo.resolve(call.params["revision"]), check_path(call.params["path"])
    file = commit.files.get(path)
    if file is None:
        raise entry_not_found(path, commit.id)
    headers = {"X-Repo-Commit": commit.id}
    if file.lfs is None:
        return _whole_or_not_modified(call, call.hub.store.objects.blob_path(file.oid), f'"{file.oid}"', headers)
    link = call.hub.signer.sign("download", f"/_storage/{file.lfs}")
    headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.lfs}"', "Accept-Ranges": "bytes"}
    return RedirectResponse(call.storage_base + link, 302, headers)


def download(call: Call) -> Response:
    """An LFS object, by a link from `resolve`."""
    call.hub.signer.check("download", call.path, dict(call.query))
    sha256 = check_sha256(call.params["sha256"])
    path = call.hub.store.objects.lfs_path(sha256)
    if not path.is_file():
        raise HubError(404, "No such object")
    return _whole_or_not_modified(call, path, f'"{sha256}"', {})


def _uploading_repo(call: Call, revision: str | None) -> Repo:
    """Whoever may open a pull request may upload for it; for a branch it takes write access."""
    repo, user = call.repo(), call.signed_in()
    own_branch = revision is not None and not revision.startswith("refs/pr/")
    if user.role != "write" or (own_branch and not may_write(user, repo.namespace)):
        raise forbidden(f"Your token does not have write access to {repo.id}")
    return repo


def _upload_path(repo: Repo, sha256: str) -> str:
    return f"/_storage/{repo.kind}s/{repo.namespace}/{repo.name}/{sha256}"


def batch(call: Call) -> Response:
    """Which of the announced LFS objects are to be uploaded, and where to."""
    asked = call.json()
    ref = asked.get("ref")
    repo = _uploading_repo(call, str(ref.get("name")) if isinstance(ref, dict) else None)
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise HubError(422, "Only uploads of objects named by their sha256")
    objects = asked.get("objects")
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise bad_request('"objects" must be a list of objects')
    answers = []
    for item in objects:
        sha256, size = check_sha256(item.get("oid")), item.get("size")
        if not isinstance(size, int) or size < 0:
            raise bad_request(f"LFS object {sha256} has no size")
        answer: dict[str, Any] = {"oid": sha256, "size": size, "authenticated": True}
        if not repo.has_lfs(sha256):
            link = call.hub.signer.sign("upload", _upload_path(repo, sha256), size=str(size))
            verify = f"{call.base}{repo.url_path}.git/info/lfs/objects/verify"
            answer["actions"] = {
                "upload": {"href": call.storage_base + link, "header": {}},
                "verify": {"href": verify, "header": {}},
            }
        answers.append(answer)
    return reply({"transfer": "basic", "objects": answers}, headers=_LFS_JSON)


def verify(call: Call) -> Response:
    """Whether an uploaded object is there, as a client asks after its upload."""
    repo, asked = _uploading_repo(call, None), call.json()
    sha256 = check_sha256(asked.get("oid"))
    if not repo.has_lfs(sha256):
        raise HubError(404, f"LFS object {sha256} has not been uploaded")
    size = call.hub.store.objects.lfs_path(sha256).stat().st_size
    if asked.get("size") != size:
        raise HubError(422, f"LFS object {sha256} has {size} bytes, not {asked.get('size')!r:.50}")
    return reply({"success": True}, headers=_LFS_JSON)


async def upload(request: Request) -> Response:
    """An LFS object by a link from `batch`: kept only if it is what was announced."""
    call = await read_call(request, with_body=False)
    query = dict(call.query)
    call.hub.signer.check("upload", call.path, query)
    repo = call.hub.store.repos.get(call.kind(), call.params["namespace"], call.params["name"])
    if repo is None:
        raise HubError(404, "The repository is gone")
    sha256 = check_sha256(call.params["sha256"])
    with call.hub.store.objects.receive(sha256, int(query["size"])) as incoming:
        async for chunk in request.stream():
            incoming.write(chunk)
        await run_in_threadpool(incoming.finish)
    await run_in_threadpool(repo.allow_lfs, sha256)
    return Response(headers={"ETag": f'"{sha256}"'})


ROUTES = [
    Route("/_storage/{sha256}", route(download)),
    Route("/_storage/{kinds}/{namespace}/{name}/{sha256}", upload, methods=["PUT"]),
]
# Models have no prefix, datasets and spaces have theirs. Models first: the shorter path is theirs.
for _repo in ("/{namespace}/{name}", "/{kinds}/{namespace}/{name}"):
    ROUTES += [
        Route(f"{_repo}.git/info/lfs/objects/batch", route(batch), methods=["POST"]),
        Route(f"{_repo}.git/info/lfs/objects/verify", route(verify), methods=["POST"]),
        Route(f"{_repo}/resolve/{{revision}}/{{path:path}}", route(resolve)),
    ]
