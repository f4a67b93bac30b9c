"""Tenant: on whose behalf a request is made, and which names are its own."""

from dataclasses import dataclass


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
