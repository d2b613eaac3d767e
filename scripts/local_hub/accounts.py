"""Users, their tokens and organisations, and who may do what with a repository."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import bad_token
from .repos import Repo


@dataclass(frozen=True)
class User:
    """Somebody with a token. `role` is "write" or "read"; `orgs` are the organisations they belong to."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass(frozen=True)
class Accounts:
    """Everybody.

    Args:
        tokens: token -> user.
    """

    tokens: Mapping[str, User] = field(default_factory=dict)

    def by_header(self, authorization: str | None) -> User | None:
        """Who sent a request: None without a token. Raises HubError 401 for a token that nobody has."""
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        user = self.tokens.get(token.strip())
        if scheme.lower() != "bearer" or user is None:
            raise bad_token()
        return user

    def exists(self, name: str) -> bool:
        return any(user.name == name for user in self.tokens.values())


def may_see(user: User | None, repo: Repo) -> bool:
    """Whether the repository exists as far as `user` is told."""
    return not repo.settings().private or (user is not None and user.owns(repo.namespace))


def may_download(user: User | None, repo: Repo) -> bool:
    """Whether `user`, who may see the repository, may read its files."""
    settings = repo.settings()
    return not settings.gated or (user is not None and (user.owns(repo.namespace) or user.name in settings.granted))


def may_write(user: User | None, namespace: str) -> bool:
    return user is not None and user.role == "write" and user.owns(namespace)
