"""GatewaySettings: one `vera serve`, from flags, a YAML file or Python."""

import ipaddress
import os
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...errors import ConfigError

ENGINE_KEY = "VERA_ENGINE_KEY"
"""Environment variable with the key of an engine at --engine-url: a command line is read by every user of the machine."""


class GatewaySettings(BaseModel):
    """One gateway. Frozen; ConfigError lists every fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = Field(None, description="Base model: hub id or folder. Needed unless --engine-url names an engine.")
    store: str = Field(description="Store of the adapters: folder or fsspec URL.")
    state: str = Field("gateway", description="Folder for keys, files, jobs and logs; gateways that share it agree.")
    model_name: str | None = Field(None, description="What clients call the base model; left out: its hub id or folder's name.")
    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0: a free one.")
    auth: bool = Field(True, description="Ask for API keys. --no-auth: everybody is admin; refused unless the host is loopback.")
    open_metrics: bool = Field(False, description="Answer /metrics without the admin key.")

    jobs: str | None = Field(
        None, description="YAML file that says how fine-tuning jobs train; left out: with --model's defaults."
    )

    engine: Literal["embedded", "vllm"] = Field("embedded", description="Engine to start as a child process.")
    engine_url: str | None = Field(None, description=f"An engine that runs already; its key, if any, in {ENGINE_KEY}.")
    engine_python: str | None = Field(None, description="Python that starts the engine, such as one of vLLM's own environment.")
    engine_args: tuple[str, ...] = Field((), description='More arguments for the engine, in one string: "--max-model-len 2048".')
    max_rank: int = Field(256, gt=0, description="Largest rank of an adapter (vllm).")
    max_bases: int = Field(1, gt=0, description="Different pairs A, B, by seed and kind, in use at once (vllm).")
    slots: int = Field(64, gt=0, description="Different adapters in one step of the engine (vllm's --max-loras).")
    resident: int = Field(10_000, gt=0, description="Adapters that stay in the engine's memory (vllm's --max-cpu-loras).")
    engine_start_seconds: float = Field(900.0, gt=0, description="How long an engine may take to load the model.")
    engine_seconds: float = Field(600.0, gt=0, description="How long the engine may be silent within a request; then 504.")
    engine_hung_seconds: float = Field(120.0, gt=0, description="An engine that doesn't answer /health for so long is restarted.")

    max_body_bytes: int = Field(4 * 2**20, gt=0, description="Bytes of a request's body; more: 413.")
    max_upload_bytes: int = Field(100 * 2**20, gt=0, description="Bytes of an uploaded file; more: 413.")
    body_seconds: float = Field(60.0, gt=0, description="How long a client may take to send a body; then 408.")
    taking_seconds: float = Field(60.0, gt=0, description="How long a client may read nothing of a stream; then it is cut off.")
    max_tokens: int = Field(4096, gt=0, description="Tokens that a request may ask for; more: 400.")
    max_choices: int = Field(16, gt=0, description="Answers of a request, prompts × n; more: 400.")
    max_stop: int = Field(4, ge=0, description="Stop sequences of a request; more: 400.")
    max_inputs: int = Field(256, gt=0, description="Texts of an embeddings or /classify request; more: 400.")
    key_concurrency: int = Field(64, gt=0, description="Requests of one key at a time; more: 429.")
    key_requests_per_minute: int = Field(0, ge=0, description="Requests of one key a minute; more: 429. 0: no limit.")
    key_tokens_per_minute: int = Field(0, ge=0, description="Tokens of one key a minute, in and out; more: 429. 0: no limit.")
    running: int = Field(256, gt=0, description="Requests that the engine has at a time; the next ones wait.")
    queue: int = Field(1024, ge=0, description="Requests that wait; more: 503.")
    queue_seconds: float = Field(60.0, gt=0, description="How long a request waits at most; then 503.")
    drain_delay: float = Field(0.0, ge=0, description="Seconds after SIGTERM with /ready at no and requests still taken.")
    drain_seconds: float = Field(30.0, ge=0, description="Seconds after that in which what runs may end.")

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as e:
            faults = [
                f"{'.'.join(map(str, f['loc'])) or 'settings'}: {f['msg'].removeprefix('Value error, ')}" for f in e.errors()
            ]
            raise ConfigError("vera serve: " + "; ".join(faults)) from None

    @field_validator("engine_args", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("engine_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(f'"{value}", expected the base of an engine, such as http://127.0.0.1:8001')
        return value and value.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _fits(self) -> "GatewaySettings":
        if self.model is None and self.engine_url is None:
            raise ValueError("name the base model with --model, or an engine that runs with --engine-url")
        if not self.auth and not is_loopback(self.host):
            raise ValueError(
                f"--no-auth makes everybody admin, and {self.host} can be reached from other machines: listen at 127.0.0.1, "
                "or make keys with vera serve keys add"
            )
        return self

    @property
    def base_name(self) -> str | None:
        """What clients call the base model; None: what the engine calls it."""
        if self.model_name is not None or self.model is None:
            return self.model_name
        return Path(self.model).resolve().name if os.path.isdir(self.model) else self.model


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there. "" and "0.0.0.0" are every address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
