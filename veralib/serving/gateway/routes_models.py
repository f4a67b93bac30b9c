"""/v1/models: the base model and one's own adapters, their versions, rollback, deletion, loading."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ...errors import StoreError, UnknownName
from .auth import Caller
from .client import names_no_model
from .errors import ApiError, json_response
from .learning import Here as Learns
from .learning import Learning
from .models import follow
from .routes_generate import ERRORS
from .schemas import AdapterRequest, RollbackRequest
from .state import Gateway, Here

T = TypeVar("T")
router = APIRouter(tags=["models"])


@router.get("/v1/models", responses=ERRORS)
async def list_models(
    tenant: Caller,
    here: Here,
    after: Annotated[str, Query(max_length=256, description="The last name of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Names of a page.")] = 100,
) -> Response:
    """The base model, then one's own adapters by name, a page at a time: the next one begins after last_id while has_more."""
    base, created = await here.base()
    first = [] if after else [_card(base, created, None)]
    # A tenant's own prefix bounds what is looked at; "" as a cursor or the base's name begins at the first adapter.
    names = await here.names.page(tenant, "" if after == base else after, limit + 1 - len(first))
    more = len(names) + len(first) > limit
    cards = first + [await _adapter(here, name, base) for name in names[: limit - len(first)]]
    last = cards[-1]["id"] if cards else None
    content = {"object": "list", "data": cards, "first_id": cards[0]["id"] if cards else None, "last_id": last, "has_more": more}
    return json_response(content)


@router.get("/v1/models/{name}/versions", responses=ERRORS)
async def list_versions(name: str, tenant: Caller, here: Here) -> Response:
    """All versions that are kept, oldest first; the last one is the current one."""
    found = await here.names.of_owner(tenant, name, here.store.versions)
    data = [{"object": "model.version", **asdict(v), "notes": dict(v.notes), "created": v.milliseconds // 1000} for v in found]
    for each in data:
        del each["milliseconds"]
    return json_response({"object": "list", "model": name, "data": data, "current": found[-1].number})


@router.post("/v1/models/{name}/rollback", responses=ERRORS)
async def roll_back(name: str, body: RollbackRequest, tenant: Caller, here: Here, learning: Learns) -> Response:
    """Makes an earlier version the current one, as a new version; the next request is answered by it."""
    if not here.names.owned(tenant, name):
        raise await here.names.unknown(tenant, name)
    try:  # that one record alone is read: the current one may be damaged, which is when this is called
        number = await here.names.ask(_alone, learning, name, here.store.rollback, name, body.version)
    except UnknownName:
        found = await here.names.of_owner(tenant, name, here.store.versions)
        known = ", ".join(str(v.number) for v in found[-20:])
        raise ApiError(
            404, f"There is no version {body.version}. Known: {known}.", code="version_not_found", param="version"
        ) from None
    return json_response({"id": name, "object": "model", "version": number, "rolled_back_to": body.version})


@router.get("/v1/models/{name:path}", responses=ERRORS)
async def get_model(name: str, tenant: Caller, here: Here) -> Response:
    """One model."""
    base, created = await here.base()
    if name == base:
        return json_response(_card(base, created, None))
    found = await here.names.of_owner(tenant, name, here.store.latest)
    return json_response({**_card(name, found.milliseconds // 1000, base), "version": found.number, "bytes": found.bytes})


@router.delete("/v1/models/{name:path}", responses=ERRORS)
async def delete_model(name: str, request: Request, tenant: Caller, here: Here, learning: Learns) -> Response:
    """Removes an adapter: all versions, what the engine holds of it, and its files and jobs. The answer lists what went."""
    if name == (await here.base())[0]:
        raise ApiError(403, "The base model can't be deleted.", code="base_model")
    if not here.names.owned(tenant, name):
        raise await here.names.unknown(tenant, name)
    removed: dict[str, int] = {}
    for hook in request.app.state.on_delete:  # first: a job that still ran would put a new version
        for what, count in (await hook(name)).items():
            removed[what] = removed.get(what, 0) + count
    versions = await _forget_versions(here, learning, name)
    if not versions and not removed:  # files and jobs may be there before the first version is
        raise await here.names.unknown(tenant, name)
    removed["versions"] = versions
    try:
        removed["loaded"] = await here.client.forget(name)
        here.deletions.note(name)
    except ApiError:  # an engine that is away has nothing in memory; one that is too busy to answer is asked again
        removed["loaded"] = 0
        here.deletions.note(name, done=False)
    return json_response({"id": name, "object": "model", "deleted": True, "removed": removed})


@router.post("/v1/load_lora_adapter", responses=ERRORS)
async def load_adapter(body: AdapterRequest, tenant: Caller, here: Here) -> Response:
    """Brings the current version into the engine's memory, so that its first request needn't wait for the store."""

    async def live() -> str:
        return await here.names.live(tenant, body.lora_name)

    async def load(asked: str) -> bool:
        answer = await here.client.post("/v1/load_lora_adapter", {"lora_name": asked, "lora_path": asked})
        if names_no_model(answer):
            return False
        if answer.status_code != 200:
            raise here.client.failed(answer, asked, body.lora_name)
        return True

    await follow(await live(), live, load, here.metrics.retries.inc)
    return json_response({"id": body.lora_name, "object": "model", "loaded": True})


@router.post("/v1/unload_lora_adapter", responses=ERRORS)
async def unload_adapter(body: AdapterRequest, tenant: Caller, here: Here) -> Response:
    """Takes all its versions out of the engine's memory; they stay in the store, and the next request loads it again."""
    await here.names.live(tenant, body.lora_name)
    return json_response({"id": body.lora_name, "object": "model", "unloaded": await here.client.forget(body.lora_name)})


def _alone(learning: Learning, name: str, call: Callable[..., T], *arguments: Any) -> T:
    """call(…) while nobody else, here or at another gateway, makes a version of this adapter live: a promotion compares with what
    is live before it puts, and a rollback copies what a deletion may just remove."""
    with learning.records.lock(name):
        return call(*arguments)


async def _forget_versions(here: Gateway, learning: Learning, name: str) -> int:
    """Deletes an adapter from the store; how many versions there were."""
    try:
        versions = len(await here.names.ask(here.store.versions, name))
    except UnknownName:
        return 0
    except StoreError:  # what is damaged can be deleted too
        versions = 1
    with contextlib.suppress(UnknownName):  # somebody else was faster
        await here.names.ask(_alone, learning, name, here.store.delete, name)
    return versions


async def _adapter(here: Gateway, name: str, base: str) -> dict[str, Any]:
    """A damaged one is listed too, with a word about it."""
    found = await here.names.latest(name)
    if found is None:
        return {**_card(name, 0, base), "damaged": True}
    return {**_card(name, found.milliseconds // 1000, base), "version": found.number}


def _card(name: str, created: int, base: str | None) -> dict[str, Any]:
    owner, colon, _ = name.partition(":")
    parent = {"parent": base} if base is not None else {}
    return {"id": name, "object": "model", "created": created, "owned_by": owner if base and colon else "veralib", **parent}
