"""vera fleet: train one adapter for each owner, see how far it is, go on with one of them."""

import inspect
from pathlib import Path
from typing import Any

from typer import Argument, Option, Typer

from ..errors import ConfigError, unknown_text
from .flags import flags, pairs, set_option, settings_argument
from .shared import fails_clearly, human_bytes, table

TRAIN = """Train one adapter for every owner of a data set, in one run; they go into a store.

Started again, it goes on: finished owners stay, interrupted ones resume, new ones join. A new base model retrains everybody from
the rows that the old run kept; the old store stays as it is.

Examples:

    vera fleet train --model gpt2 --data posts.jsonl --owner user --output fleet

    vera fleet train fleet.yaml --slots 512

    vera fleet train --base gpt2-large --from fleet --output fleet-large
"""
PANELS = {
    "model": "Run",
    "task": "Data",
    "revision": "Base model",
    "rank": "Adapters",
    "seed": "Training",
    "shared_epochs": "Shared start",
    "store": "Output",
}
DICTS = ("options",)


def make_fleet_train() -> Any:
    """The command, built from FleetSettings."""
    from ..fleet.settings import FleetSettings

    def train(**given: Any) -> None:
        base, old = given.pop("base"), given.pop("from_")
        run(given.pop("settings_file"), given.pop("set"), {k: v for k, v in given.items() if v is not None}, base, old)

    def option(name: str, flag: str, text: str) -> inspect.Parameter:
        default = Option(None, flag, help=text, rich_help_panel="Run", show_default=False)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=str | None)

    parameters = [
        settings_argument(),
        *flags(FleetSettings, PANELS, DICTS),
        set_option("options.levels=rademacher"),
        option("base", "--base", "A new base model, with --from."),
        option("from_", "--from", "The output folder of the run whose owners are retrained."),
    ]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    train.__doc__ = TRAIN
    return train


def run(settings_file: str | None, sets: list[str], given: dict[str, Any], base: str | None, old: str | None) -> None:
    """One fleet run from a file, --set pairs and flags; prints what came out."""
    from ..fleet.run import train_fleet
    from ..training.folder import is_main_process

    rows = None
    given = {**given, **pairs(sets, DICTS)}
    if (base is None) != (old is None):
        raise ConfigError("--base and --from go together: the new base model, and the run whose owners are retrained on it.")
    if base is not None and old is not None:
        from ..fleet.data import all_kept
        from ..fleet.folder import read_settings

        before = {k: v for k, v in read_settings(Path(old)).items() if k not in ("output", "store", "revision")}
        given = {**before, **_from_file(settings_file), **given, "model": base}
        settings_file = None
        if given.get("output") in (None, old):
            raise ConfigError(f"--from {old} needs another --output: both generations stay usable.")
        rows = all_kept(Path(old))
    settings = _settings(settings_file, given)
    result = train_fleet(settings, rows, progress=_say)
    if not is_main_process():
        return
    found = result.summary()
    if settings.plot:
        from ..fleet.plot import draw

        draw(result.owners, Path(settings.output) / "plot.png")
    lines = [
        ("owners", f"{found['owners']:,}" + (f", {result.skipped:,} of them from earlier runs" if result.skipped else "")),
        ("held-out loss, mean over owners", _change(found["loss_before"], found["loss_after"])),
        ("owners that got better", f"{found['improved']:,}"),
        ("parameters an owner", f"{result.parameters_per_owner:,}"),
        ("bytes of all adapters in float32", f"{found['bytes']:,} ({human_bytes(found['bytes'])})"),
        ("steps", f"{result.steps:,} mixed batches, {result.tokens:,} tokens and {result.padding:,} of padding"),
        ("seconds", f"{result.seconds:.1f}"),
        ("store", result.store),
    ]
    table(f"A fleet on {settings.model}, in {settings.output}", ("", "value"), lines)
    for name in found["diverged"][:5]:
        print(f'"{name}" diverged and has no adapter: its gradient was not finite. Lower the learning rate.')
    for name, why in list(result.unusable.items())[:5]:
        print(f'"{name}" was left out: {why}')
    print(f"Next: vera fleet status {settings.output}")


def _change(before: float | None, after: float | None) -> str:
    return "not measured" if before is None or after is None else f"{before:.4f} -> {after:.4f}"


def _settings(settings_file: str | None, given: dict[str, Any]) -> Any:
    from ..fleet.settings import FleetSettings

    return FleetSettings(**{**_from_file(settings_file), **given})


def _from_file(settings_file: str | None) -> dict[str, Any]:
    if not settings_file:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(settings_file).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise ConfigError(f"can't read the settings file {settings_file}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{settings_file} is no YAML file: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{settings_file} holds a {type(values).__name__}, expected settings as `name: value` lines")
    return {str(k).replace("-", "_"): v for k, v in values.items()}


def _say(line: str) -> None:
    print(line, flush=True)


def status(folder: str = Argument(help="The output folder of a run.")) -> None:
    """How far a fleet is: who is done, who stands in a slot, who diverged.

    Example:

        vera fleet status fleet
    """
    from ..fleet.folder import ended, read_settings, standing

    place = Path(folder)
    settings = read_settings(place)
    done, now = ended(place), standing(place)
    kinds = {k: [o for o in done.values() if o["status"] == k] for k in ("trained", "stopped", "diverged")}
    finished = (place / "fleet.json").exists()
    rows = [
        ("base model", settings["model"]),
        ("trained", f"{len(kinds['trained']):,}"),
        ("stopped early, at their best", f"{len(kinds['stopped']):,}"),
        ("diverged", f"{len(kinds['diverged']):,}" + "".join(f', "{o["name"]}"' for o in kinds["diverged"][:5])),
        ("in a slot, or interrupted there", f"{sum(n not in done for n in now):,}"),
        ("bytes of all adapters in float32", human_bytes(sum(o["bytes"] for o in done.values()))),
        ("run", "finished" if finished else "not finished: start it again and it goes on"),
    ]
    table(f"The fleet in {folder}", ("", "value"), rows)


def update(
    folder: str = Argument(help="The output folder of a run."),
    owner: str = Argument(help="Whose adapter."),
    data: str = Option(None, help="New rows of this owner: csv, tsv, jsonl or txt; left out: the kept rows alone."),
) -> None:
    """Go on training one owner's adapter, with new rows beside those that were kept.

    Example:

        vera fleet update fleet ann --data new_posts.jsonl
    """
    from ..fleet.run import update_owner
    from ..training.rows import read_rows

    update_owner(folder, owner, read_rows(data) if data else [], _say)


def forget(
    folder: str = Argument(help="The output folder of a run that isn't going on."),
    owner: str = Argument(help="Whose adapter, kept rows and lines are removed."),
) -> None:
    """Remove one owner from a fleet: its adapter's versions, its kept rows, what the run wrote about it.

    The data that the run was given are yours to remove.

    Example:

        vera fleet forget fleet ann
    """
    from ..fleet.folder import ended, forget_owner

    gone = forget_owner(Path(folder), owner)
    if not gone:
        known = unknown_text("owner", owner, sorted(ended(Path(folder))))
        raise ConfigError(f'{folder} holds nothing of "{owner}": {known}')
    print(f'"{owner}" is gone from {folder}: {gone} things were removed.')


def build() -> Any:
    """The typer application of `vera fleet`."""
    app = Typer(help="One adapter for each owner: train, status, update, forget.", no_args_is_help=True)
    app.command("train")(fails_clearly(make_fleet_train()))
    app.command()(fails_clearly(status))
    app.command()(fails_clearly(update))
    app.command()(fails_clearly(forget))
    return app
