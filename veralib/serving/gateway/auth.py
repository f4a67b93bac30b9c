"""Who asks: the key of a request, checked before its body is read."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, error_response
from .keys import Keys
from .tenants import EVERYBODY, Tenant

OPEN = frozenset({"/health", "/ready", "/openapi.json"})
"""Paths that anybody may ask."""
_BEARER = HTTPBearer(auto_error=False, description="sk-vera-…, from vera serve keys add")


class Authenticate:
    """ASGI middleware: 401 without a valid key. Else the request's state has its tenant. keys: None where keys are off."""

    def __init__(self, app: ASGIApp, keys: Keys | None, open_paths: frozenset[str] = OPEN) -> None:
        self.app, self.keys, self.open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = EVERYBODY if self.keys is None else self._tenant(self.keys, scope)
            if tenant is None and scope["path"] not in self.open_paths:
                error = ApiError(
                    401,
                    "No valid API key: send Authorization: Bearer sk-vera-…, as the openai client does with api_key.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)

    @staticmethod
    def _tenant(keys: Keys, scope: Scope) -> Tenant | None:
        for name, value in scope["headers"]:
            if name == b"authorization":
                kind, _, key = value.decode("latin-1").partition(" ")
                return keys.find(key.strip()) if kind.lower() == "bearer" else None
        return None


def check_key(keys: Keys | None, tenant: Tenant) -> None:
    """ApiError 401 where a request's key was revoked since it began. Who asks holds the lock under which it writes, and who
    erases a tenant takes that lock after the revocation: so nothing is added behind an erasure."""
    if keys is not None and not keys.holds(tenant.id):
        raise ApiError(401, "The API key was revoked meanwhile. Nothing was kept.", code="invalid_api_key")


def tenant_of(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)] = None) -> Tenant:
    """The tenant that a request comes from: a dependency of every route but the open ones."""
    tenant = getattr(request.state, "tenant", None)
    if tenant is None:  # an open path that asks all the same
        raise ApiError(401, "No valid API key.", code="invalid_api_key")
    return tenant


def admin_of(tenant: Annotated[Tenant, Depends(tenant_of)]) -> Tenant:
    """The same, and 403 for everybody but admins."""
    if not tenant.admin:
        raise ApiError(403, "This needs an admin key.", code="admin_only")
    return tenant


Caller = Annotated[Tenant, Depends(tenant_of)]
Admin = Annotated[Tenant, Depends(admin_of)]
