"""Links that carry their own permission, as to the storage behind the Hub: clients follow them without their token."""

import hashlib
import hmac
import time
from urllib.parse import urlencode

from .errors import HubError

_LIFETIME = 3600  # seconds


class Signer:
    """Makes and checks links.

    Args:
        secret: the store's key.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def _signature(self, action: str, path: str, values: dict[str, str]) -> str:
        text = "\n".join([action, path, *(f"{key}={values[key]}" for key in sorted(values))])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def sign(self, action: str, path: str, **values: str) -> str:
        """`path` with a query that allows `action` on it for an hour; `values` cannot be changed either."""
        values["expires"] = str(int(time.time()) + _LIFETIME)
        return f"{path}?{urlencode({**values, 'signature': self._signature(action, path, values)})}"

    def check(self, action: str, path: str, query: dict[str, str]) -> None:
        """Raises HubError 403 unless `sign` made this link, and not long ago."""
        values = dict(query)
        signature = values.pop("signature", "")
        if not hmac.compare_digest(signature.encode(), self._signature(action, path, values).encode()):
            raise HubError(403, "The link's signature does not fit")
        if int(values["expires"]) < time.time():
            raise HubError(403, "The link has expired")
