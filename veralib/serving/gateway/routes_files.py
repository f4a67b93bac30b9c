"""/v1/files: training files, as the openai client's client.files asks for them."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile
from starlette.responses import Response, StreamingResponse

from .auth import Caller
from .errors import json_response
from .learning import Here
from .paging import page

router = APIRouter(tags=["files"])
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A wrong field, or no training file."},
    401: {"description": "No valid key."},
    404: {"description": "Nothing of this id among one's own."},
    429: {"description": "Too many."},
}


@router.post("/v1/files", responses=ERRORS)
def create_file(
    file: Annotated[UploadFile, File(description="Chats, one JSON object a line.")],
    purpose: Annotated[str, Form(description='"fine-tune"')],
    tenant: Caller,
    here: Here,
) -> Response:
    """Keeps a training file. Every line is checked first; an error names the lines that are wrong."""
    return json_response(here.uploads.create(tenant, file.file, file.filename or "", purpose).to_openai())


@router.get("/v1/files", responses=ERRORS)
def list_files(
    tenant: Caller,
    here: Here,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(max_length=128, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """One's own files, the newest first."""
    found = [upload for upload in here.uploads.of_tenant(tenant) if purpose in (None, upload.purpose)]
    return json_response(page(found, lambda u: u.id, lambda u: u.to_openai(), after, limit, order))


@router.get("/v1/files/{file_id}", responses=ERRORS)
def get_file(file_id: str, tenant: Caller, here: Here) -> Response:
    """One file's record."""
    return json_response(here.uploads.get(tenant, file_id).to_openai())


@router.get("/v1/files/{file_id}/content", responses=ERRORS)
def get_content(file_id: str, tenant: Caller, here: Here) -> Response:
    """Its bytes as they came."""
    upload = here.uploads.get(tenant, file_id)
    content = here.uploads.content(upload)
    # Never as a page: a browser that is sent here must not run what somebody uploaded.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Length": str(upload.bytes)}
    return StreamingResponse(content, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}", responses=ERRORS)
def delete_file(file_id: str, tenant: Caller, here: Here) -> Response:
    """Gone when it returns. A job that waits for it fails; a run that has begun keeps its copy until it ends."""
    here.uploads.delete(upload := here.uploads.get(tenant, file_id))
    return json_response({"id": upload.id, "object": "file", "deleted": True})
