"""vera serve: the OpenAI API in front of thousands of adapters; vera serve keys: who may use it; vera serve forget."""

import datetime
import inspect
from pathlib import Path
from typing import Any

from typer import Argument, Context, Option, Typer

from ..errors import ConfigError
from .flags import flags
from .shared import fails_clearly, table

SERVE = """Serve a base model and all adapters of a store behind the OpenAI API, each tenant its own.

Examples:

    vera serve keys add --prefix acme: --state gateway

    vera serve --model models/books-4m --store fleet/store --state gateway

    vera serve --model meta-llama/Llama-3.2-1B --store s3://bucket/adapters --engine vllm --engine-python vllm/bin/python
"""
PANELS = {"model": "What is served", "host": "Where", "engine": "Engine", "max_body_bytes": "Limits"}


def make_serve() -> Any:
    """The command, built from GatewaySettings."""
    from ..errors import need

    try:
        from ..serving.gateway.settings import GatewaySettings
    except ImportError as e:
        raise need(str(e.name), "serve", "vera serve") from e

    def serve(ctx: Context, **given: Any) -> None:
        if ctx.invoked_subcommand is not None:
            return
        settings_file = given.pop("settings_file")
        chosen = {k: v for k, v in given.items() if v is not None}
        fails_clearly(start)({**_from_file(settings_file), **chosen})

    file = Option(None, "--settings", help="These settings as YAML; flags win over it.", rich_help_panel="What is served")
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Context),
        inspect.Parameter("settings_file", inspect.Parameter.KEYWORD_ONLY, default=file, annotation=str | None),
        *flags(GatewaySettings, PANELS, ()),
    ]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    serve.__doc__ = SERVE
    return serve


def start(given: dict[str, Any]) -> None:
    """Serves until it is told to end."""
    try:
        from ..serving.gateway.run import run
    except ImportError as e:
        from ..errors import need

        raise need(str(e.name), "serve", "vera serve") from e
    from ..serving.gateway.keys import Keys
    from ..serving.gateway.settings import GatewaySettings

    if "store" not in given:
        raise ConfigError("vera serve: name the store of the adapters with --store; a new folder becomes an empty one.")
    settings = GatewaySettings(**given)
    if settings.auth and not Keys(settings.state).list():
        print(f"No key yet: vera serve keys add --prefix acme: --state {settings.state}", flush=True)
    run(settings)


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise ConfigError(f"can't read {path}: {e}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings, expected lines such as store: fleet/store")
    return found


STATE = Option("gateway", "--state", help="The gateway's folder.")


def add(
    prefix: str = Option(None, "--prefix", help='What the names of all its adapters begin with, such as "acme:".'),
    admin: bool = Option(False, "--admin", help="A key for everything, instead of a prefix."),
    note: str = Option("", "--note", help="For your own list."),
    state: str = STATE,
) -> None:
    """Make a key. It is shown once: the gateway keeps a hash of it. Running gateways take it at once.

    Example:

        vera serve keys add --prefix acme:
    """
    key, record = _keys(state).add(prefix, admin=admin, note=note)
    print(f"{key}\nid {record.id}, for {'everything' if admin else f'names that begin with {prefix}'}")


def list_(state: str = STATE) -> None:
    """Show all keys, without what they are.

    Example:

        vera serve keys list
    """
    rows = [
        (r.id, "everything" if r.admin else r.prefix, f"{datetime.datetime.fromtimestamp(r.created):%Y-%m-%d %H:%M}", r.note)
        for r in _keys(state).list()
    ]
    table("keys", ("id", "for", "made", "note"), rows)


def revoke(id: str = Argument(help="The key's id, from vera serve keys list."), state: str = STATE) -> None:
    """Take a key back. Its next request is refused; the adapters stay.

    Example:

        vera serve keys revoke 0123456789ab
    """
    _keys(state).revoke(id)
    print(f"revoked {id}")


def forget(
    prefix: str = Argument(help='Whose everything is removed, such as "acme:".'),
    store: str = Option(..., "--store", help="The store of the adapters."),
    state: str = STATE,
) -> None:
    """Remove a tenant: its keys, adapters with all versions, files, jobs, and what engines hold of them in memory.

    Gateways may run meanwhile: a run that trains stops and goes on without it.

    Example:

        vera serve forget acme: --store fleet/store --state gateway
    """
    try:
        from ..serving.gateway.deletion import delete_tenant
        from ..serving.gateway.learning import Learning, LearningSettings
    except ImportError as e:
        from ..errors import need

        raise need(str(e.name), "serve", "vera serve forget") from e
    from ..serving.gateway.deletions import Deletions
    from ..serving.gateway.tenants import PREFIX
    from ..store import open_store

    if PREFIX.fullmatch(prefix) is None:
        raise ConfigError(f'prefix is "{prefix[:80]}", expected one of vera serve keys list, such as "acme:".')
    for what, where in (("store", f"{store}/store.json"), ("state folder", state)):
        if "://" not in where and not Path(where).exists():
            raise ConfigError(f"there is no {what} at {where}: name those of the gateway, with --store and --state.")
    learning = Learning(state, open_store(store), LearningSettings(None, ""))
    counts, names = delete_tenant(learning, _keys(state), Deletions(state), prefix)
    if not names and not any(counts.values()):
        raise ConfigError(f'nothing begins with "{prefix}" in {store} and {state}.')
    table(
        f"what went of {prefix}", ("what", "how many"), [("adapters", str(len(names))), *((k, str(n)) for k, n in counts.items())]
    )
    for name in names:
        print(name)


def _keys(state: str) -> Any:
    from ..serving.gateway.keys import Keys

    return Keys(state)


def build() -> Any:
    """The typer application of `vera serve`."""
    app = Typer(invoke_without_command=True)
    app.callback(invoke_without_command=True)(fails_clearly(make_serve()))
    keys = Typer(help="API keys: add, list, revoke.", no_args_is_help=True)
    for name, command in (("add", add), ("list", list_), ("revoke", revoke)):
        keys.command(name)(fails_clearly(command))
    app.add_typer(keys, name="keys")
    app.command()(fails_clearly(forget))
    return app
