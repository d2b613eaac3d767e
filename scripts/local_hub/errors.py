"""What the hub refuses, in the words and codes that Hub clients know: `X-Error-Code` decides which class they raise."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class HubError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: for people; sent as `X-Error-Message` and as `error` in the body.
        code: `X-Error-Code` or None.
        headers: further headers of the answer.
        body: further keys of the JSON body.
    """

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def bad_request(message: str) -> HubError:
    return HubError(400, message)


def bad_token() -> HubError:
    # This very message tells the client that the token is wrong, and not that the repository is missing.
    return HubError(401, "Invalid credentials in Authorization header")


def repo_not_found(user: str | None) -> HubError:
    """A missing repository, and a private one of somebody else: nobody learns which. Without a token it is 401."""
    if user is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str, message: str | None = None) -> HubError:
    # The commit lets clients remember that this file is not in it.
    return HubError(404, message or f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit})


def gated(user: str | None, kind: str, repo_id: str, base: str) -> HubError:
    start = f"Access to {kind} {repo_id} is restricted"
    if user is None:
        message = f"{start}. You must have access to it and be authenticated to access it. Please log in."
        return HubError(401, message, "GatedRepo")
    return HubError(403, f"{start} and you are not in the authorized list. Visit {base}/{repo_id} to ask.", "GatedRepo")


def forbidden(message: str) -> HubError:
    return HubError(403, message)
