"""/v1/fine_tuning/jobs: as the openai client's client.fine_tuning.jobs asks for them."""

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field, StringConstraints
from starlette.responses import Response

from ...errors import StoreError, StoreUnavailable
from ..names import is_name
from .auth import Caller
from .errors import LOG, ApiError, json_response, shown
from .jobs import Job
from .learning import Here, Learning
from .paging import new_id, page
from .promotion import version_of
from .records import DamagedRecord
from .routes_files import ERRORS
from .schemas import Few, Strict
from .tenants import Tenant

router = APIRouter(tags=["fine-tuning"])
Text = Annotated[str, StringConstraints(strict=True, max_length=256)]
Auto = Literal["auto"]


class Hyperparameters(Strict):
    """ "auto": the gateway's own."""

    n_epochs: Auto | Annotated[int, Field(strict=True, ge=1, le=100)] = "auto"
    batch_size: Auto | Annotated[int, Field(strict=True, ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(strict=True, gt=0, le=1000, allow_inf_nan=False)] = "auto"


class Supervised(Strict):
    """The only method there is."""

    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    """OpenAI's form since 2024; hyperparameters at the top is the older one."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class JobRequest(Strict):
    """What client.fine_tuning.jobs.create sends."""

    model: Text = Field(description="The base model's name, or that of an adapter of one's own to go on from.")
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)] | None = Field(
        None, description="The adapter's name behind the key's prefix; left out: the model's own name, or a new one."
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="There are none.")
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16), Few] | None = None  # noqa: E501  # fmt: skip


@router.post("/v1/fine_tuning/jobs", responses=ERRORS)
def create_job(body: JobRequest, tenant: Caller, here: Here) -> Response:
    """Trains an adapter on a file: a new one, or the next version of one that is there. It waits for others to share a run."""
    if here.settings.model is None:
        raise ApiError(400, "This gateway takes no jobs: it was started without --model.", code="training_off")
    name, start = _names(here, tenant, body)
    training = here.uploads.get(tenant, body.training_file, "training_file")
    validation = None if body.validation_file is None else here.uploads.get(tenant, body.validation_file, "validation_file")
    if validation is None and training.rows < 2:
        raise ApiError(
            400,
            "The training file has one row, and none is left to measure by: give two or more, or a validation_file.",
            code="too_few_rows",
            param="training_file",
        )
    if body.method is not None and body.hyperparameters is not None:
        raise ApiError(400, "Give hyperparameters within method or beside it, not both.", param="hyperparameters")
    inner = body.method.supervised.hyperparameters if body.method is not None and body.method.supervised is not None else None
    wanted = inner or body.hyperparameters or Hyperparameters()
    settings = here.settings
    epochs = settings.epochs if wanted.n_epochs == "auto" else wanted.n_epochs
    if training.rows * epochs > settings.max_examples:
        raise ApiError(
            400,
            f"{training.rows:,} rows in {epochs} epochs are {training.rows * epochs:,} examples, expected at most "
            f"{settings.max_examples:,}: lower n_epochs, or give fewer rows.",
            code="too_many_examples",
            param="hyperparameters",
        )
    job = Job(
        id=new_id("ftjob"),
        tenant=tenant.prefix,
        name=name,
        model=body.model,
        start=start,
        training_file=training.id,
        validation_file=None if validation is None else validation.id,
        epochs=epochs,
        batch_size=settings.batch_size if wanted.batch_size == "auto" else wanted.batch_size,
        lr_multiplier=1.0 if wanted.learning_rate_multiplier == "auto" else wanted.learning_rate_multiplier,
        seed=body.seed or 0,
        created_at=int(time.time()),
        metadata=body.metadata or {},
    )
    here.jobs.add(job, tenant)
    return json_response(here.jobs.to_openai(job))


def _names(here: Learning, tenant: Tenant, body: JobRequest) -> tuple[str, str | None]:
    """(the adapter that the job makes a version of, the other adapter that it begins from or None)."""
    base = here.settings.base_name
    goes_on = body.model != base
    if goes_on and not (is_name(body.model) and tenant.owns(body.model) and body.model in here.store):
        raise ApiError(404, f'There is no model "{shown(body.model, 128)}" for this key.', code="model_not_found", param="model")
    if body.suffix is None:
        return (body.model, None) if goes_on else (f"{tenant.prefix}ft-{secrets.token_hex(6)}", None)
    if tenant.prefix and body.suffix.startswith(tenant.prefix):
        raise ApiError(
            400,
            f'suffix is "{shown(body.suffix, 64)}", which makes the name "{shown(tenant.prefix + body.suffix, 128)}": '
            f'leave "{tenant.prefix}" out, the gateway writes it.',
            code="invalid_suffix",
            param="suffix",
        )
    name = tenant.prefix + body.suffix
    if not is_name(name) or name == base:
        raise ApiError(
            400,
            f'suffix is "{shown(body.suffix, 64)}", expected letters, digits, ".", "_", ":" and "-" that make no more than 128 '
            "characters with the prefix, and another name than the base model's.",
            code="invalid_suffix",
            param="suffix",
        )
    if goes_on and name != body.model and name in here.store:
        # Its held-out loss would be compared with that of an adapter it doesn't come from.
        raise ApiError(
            400,
            f'There is a "{name}" already: give it as model to go on from it, or delete it first.',
            code="name_taken",
            param="suffix",
        )
    return name, body.model if goes_on and name != body.model else None


@router.get("/v1/fine_tuning/jobs", responses=ERRORS)
def list_jobs(
    tenant: Caller,
    here: Here,
    after: Annotated[str | None, Query(max_length=128, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Response:
    """One's own jobs, the newest first."""

    def shown_job(where: tuple[str, str]) -> dict[str, Any] | None:
        job = here.jobs.find(*where)
        try:
            return None if job is None else here.jobs.to_openai(job)
        except DamagedRecord as e:
            LOG.error("jobs: %s isn't listed: %s", where[1], e)
            return None

    return json_response(page(here.jobs.of_tenant(tenant), lambda where: where[1], shown_job, after, limit))


@router.get("/v1/fine_tuning/jobs/{job_id}", responses=ERRORS)
def get_job(job_id: str, tenant: Caller, here: Here) -> Response:
    """One job."""
    return json_response(here.jobs.to_openai(here.jobs.get(tenant, job_id)))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", responses=ERRORS)
def cancel_job(job_id: str, tenant: Caller, here: Here) -> Response:
    """Nothing of it goes live any more. A run that has begun goes on for the others in it; this job's result is thrown away."""
    job = here.jobs.get(tenant, job_id)
    with here.records.lock(job.name):
        if here.jobs.has_ended(job):
            ended = (here.jobs.ending(job) or {}).get("status", "deleted")
            raise ApiError(400, f"The job has {ended} already.", code="job_ended")
        if (number := _live(here, job)) is not None:  # the gateway that put it died before it said so; the next one does
            raise ApiError(
                400, f"Version {number}, which the job made, went live already: roll back or delete the model.", code="job_ended"
            )
        here.jobs.end(job, "cancelled", "The job was cancelled.")
    return json_response(here.jobs.to_openai(job))


def _live(here: Learning, job: Job) -> int | None:
    """The version that a job has put, or None, also where it is damaged: such a one hinders nobody from cancelling."""
    try:
        return version_of(here.store, job)
    except StoreUnavailable:
        raise
    except StoreError as e:
        LOG.warning("jobs: whether %s made a version of its adapter can't be read: %s", job.id, e)
        return None


@router.get("/v1/fine_tuning/jobs/{job_id}/events", responses=ERRORS)
def list_events(
    job_id: str,
    tenant: Caller,
    here: Here,
    after: Annotated[str | None, Query(max_length=128, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Response:
    """What happened to it, the newest first."""
    events = here.jobs.events(here.jobs.get(tenant, job_id))
    return json_response(page(events, lambda event: event["id"], lambda event: event, after, limit))


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", responses=ERRORS)
def list_checkpoints(job_id: str, tenant: Caller, here: Here) -> Response:
    """None: a job keeps its end alone. Earlier versions of the adapter are at /v1/models/{name}/versions."""
    here.jobs.get(tenant, job_id)
    return json_response(page([], str, dict, None, 1))
