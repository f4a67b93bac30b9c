"""Tenant: on whose behalf a request is made, and which names are its own."""

import hashlib
import json
import re
from dataclasses import dataclass

PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}:")
"""One ":" and nothing behind it, so no prefix is the beginning of another and no name belongs to two."""


@dataclass(frozen=True)
class Tenant:
    """Made from an API key. id: of the key's record, never the key itself.

    prefix: what the names of all its adapters begin with, such as "acme:", which no other prefix begins with; "": all of them.
    """

    id: str
    prefix: str
    admin: bool = False

    def owns(self, name: str) -> bool:
        """Whether an adapter of this name is this tenant's."""
        return self.admin or name.startswith(self.prefix)

    def salt(self, given: str | None = None) -> str:
        """What the engine keys this tenant's prefix cache by. given: the client's own, which splits the tenant's part further
        and never leaves it. Keys of one prefix share a part; so do gateways."""
        return hashlib.sha256(json.dumps([self.prefix, self.admin, given]).encode()).hexdigest()[:32]


EVERYBODY = Tenant("no-auth", "", admin=True)
"""Who asks where keys are off."""
