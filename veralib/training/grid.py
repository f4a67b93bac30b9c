"""A grid of runs: tasks × methods × rates × seeds, one result file each. `vera sweep grid.yaml` runs it (sweep.py).

    output: results/glue
    common: {model: minilm_l6_fp16, epochs: 3}
    tasks:
      cola: {data: glue/CoLA, text: sentence, metric: matthews}
    methods:
      LoRA r=1: {method: lora, rank: 1, sweep: {lr: [5e-4, 1.5e-3, 5e-3]}}
    seeds: [0, 1, 2]
    seeded: [seed, basis_seed]     # the settings that take the seed; these, if left out
    against: [LoRA r=1]            # what `vera reproduce` compares the others with; LoRA r=1 and r=8, if left out
    over: bytes                    # or parameters: what its plot shows quality over
    also: [results/glue]           # other grids' outputs: their runs of equal settings are taken over, not repeated
    about: what a reader of the page must know

A recipe's settings, with others about them: `recipe: glue-rte-base` and `protocol: honest` beside a task's fields. `times` sweeps
around a recipe's own rate: {lr: {times: [0.3, 1, 3]}}, which is what is swept where nothing is said, times 1.

Relative paths of models and data are looked for below VERALIB_DATA. A run that has its file isn't repeated.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VeraError, unknown_text
from .settings import Settings

KEYS = ("output", "title", "about", "common", "tasks", "methods", "seeds", "seeded", "against", "over", "also")
SEEDED = ("seed", "basis_seed")


@dataclass(frozen=True)
class Cell:
    """One run. rate, value: the setting that is swept, and what it is here."""

    task: str
    name: str
    fields: Mapping[str, Any]
    rate: str
    value: float
    seed: int
    seeded: tuple[str, ...] = SEEDED

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that this run differs in from the defaults, its output aside."""
        return {**self.fields, self.rate: self.value, **dict.fromkeys(self.seeded, self.seed)}

    def file(self, output: Path) -> Path:
        """Its result file below the grid's output folder."""
        name = "".join(c if c.isalnum() or c in ".=" else "-" for c in self.name.lower()).replace("=", "")
        return output / self.task / f"{name}-{self.rate}{self.value:g}-seed{self.seed}.json"

    def done(self, output: Path) -> bool:
        """Whether its result is there. ConfigError where it is of other settings: the grid has changed since."""
        path = self.file(output)
        if not path.exists():
            return False
        if keys := self._unlike(json.loads(path.read_text(encoding="utf-8"))["settings"]):
            raise ConfigError(
                f"{path} is of other settings than the grid has now ({', '.join(keys)}): move it away, or give the grid another "
                "output."
            )
        return True

    def same(self, settings: Mapping[str, Any]) -> bool:
        """Whether a result file's settings are this run's."""
        return not self._unlike(settings)

    def _unlike(self, settings: Mapping[str, Any]) -> list[str]:
        there = {key: _plain(value) for key, value in settings.items()}
        here = {key: _plain(value) for key, value in json.loads(json.dumps(self.settings)).items()}
        return sorted(k for k in {*there, *here} if there.get(k) != here.get(k))


def _plain(value: Any) -> Any:
    """A setting in one of its spellings: "a,b" is [a, b], and 3 is 3.0."""
    if isinstance(value, str) and "," in value:
        return [v.strip() for v in value.split(",")]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class Grid:
    """A checked grid. metrics: what each task is judged by."""

    output: Path
    title: str
    about: str
    cells: tuple[Cell, ...]
    metrics: Mapping[str, str]
    against: tuple[str, ...] = ("LoRA r=1", "LoRA r=8")
    over: str = "bytes"
    also: tuple[Path, ...] = ()

    def missing(self, only: str = "", shard: tuple[int, int] = (1, 1)) -> list[Cell]:
        """The runs without a result file, seed by seed, so that an unfinished grid has every method and rate.

        only: those whose "task/method" is this text or, where none is, holds it; ConfigError where no run of the grid does.
        shard: (3, 16) is the third of 16 parts, always the same runs, however many are done.
        """
        named = [(f"{c.task}/{c.name}".lower(), c) for c in self.cells]
        chosen = [c for name, c in named if name == only.lower()] or [c for name, c in named if only.lower() in name]
        if not chosen:
            there = ", ".join(dict.fromkeys(f"{c.task}/{c.name}" for c in self.cells))
            raise ConfigError(f'no run of this grid is called "{only}". There: {there}.')
        part = sorted(chosen, key=lambda c: c.seed)[shard[0] - 1 :: shard[1]]
        return [c for c in part if not c.done(self.output)]


def read_grid(path: str | Path, output: str | Path | None = None) -> Grid:
    """The grid of a YAML file. ConfigError lists every fault: unknown keys, and settings that no run would take."""
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"can't read the grid {path}: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected a grid: {', '.join(KEYS)}")
    faults = [unknown_text("key of a grid", k, KEYS) for k in raw if k not in KEYS]
    faults += [f"{k} is missing or empty" for k in ("methods",) if not raw.get(k)]
    faults += _shapes(raw)
    if not faults:
        common, tasks = raw.get("common") or {}, raw.get("tasks") or {"task": {}}
        cells = list(_cells(common, tasks, raw["methods"], raw.get("seeds") or [0], tuple(raw.get("seeded") or SEEDED), faults))
        checked = {task: _check(c, faults) for task, c in {c.task: c for c in cells}.items()}
        for cell in {(c.task, c.name, c.value): c for c in cells}.values():
            _check(cell, faults)
        faults += [
            f"{path.name} would be the file of several runs: name the methods apart" for path, n in _counted(cells) if n > 1
        ]
    if faults:
        raise ConfigError("\n  ".join([f"the grid {path}:", *dict.fromkeys(faults)]))
    place = Path(output or raw.get("output") or Path(path).stem)
    metrics = {t: s.resolved_metric for t, s in checked.items() if s}
    more: dict[str, Any] = {k: tuple(raw[k]) if k == "against" else raw[k] for k in ("against", "over") if raw.get(k)}
    more["also"] = tuple(Path(name) for name in raw.get("also") or ())
    return Grid(place, raw.get("title") or Path(path).stem, raw.get("about") or "", tuple(cells), metrics, **more)


def _shapes(raw: Mapping[str, Any]) -> Iterator[str]:
    """What isn't the kind of thing that its key holds."""
    for key in ("common", "tasks", "methods"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            yield f"{key} is a {type(raw[key]).__name__}, expected `name: value` lines"
    for key in ("tasks", "methods"):
        for name, fields in (raw[key] if isinstance(raw.get(key), dict) else {}).items():
            if not isinstance(fields, dict):
                yield f"{key}: {name} is {fields!r}, expected its settings, {{}} for none"
    for key, kind in (("seeds", int), ("seeded", str), ("against", str), ("also", str)):
        values = raw.get(key)
        if values is not None and not (isinstance(values, list) and values and all(type(v) is kind for v in values)):
            yield f"{key} is {values!r}, expected a list of {'whole numbers' if kind is int else 'names'}"
    if raw.get("over", "bytes") not in ("bytes", "parameters"):
        yield f"over is {raw['over']!r}, expected bytes or parameters"


def _counted(cells: Sequence[Cell]) -> Iterator[tuple[Path, int]]:
    yield from Counter(c.file(Path()) for c in cells).items()


def _cells(common: Any, tasks: Any, methods: Any, seeds: Any, seeded: tuple[str, ...], faults: list[str]) -> Iterator[Cell]:
    for (task, of_task), (name, of_method), seed in itertools.product(tasks.items(), methods.items(), seeds):
        fields = {**common, **of_task, **of_method}
        alone = {"times": [1]} if "recipe" in fields and "lr" not in fields else [fields.get("lr")]
        swept = fields.pop("sweep", None) or {"lr": alone}
        values: Any = next(iter(swept.values()), None) if isinstance(swept, dict) and len(swept) == 1 else None
        if isinstance(values, dict) and list(values) == ["times"]:
            values = _around(fields, next(iter(swept)), values["times"], f"{task} {name}", faults)
            if values is None:
                continue
        if not isinstance(values, list) or not values or not all(_is_number(v) for v in values):
            faults.append(f"{name}: sweep is {swept!r}, expected one setting with its values, such as {{lr: [1e-3, 1e-2]}}")
            continue
        [rate] = swept
        for value in values:
            yield Cell(str(task), str(name), fields, rate, float(value), int(seed), seeded)


def _around(fields: Mapping[str, Any], rate: str, times: Any, what: str, faults: list[str]) -> list[float] | None:
    """The rate without the sweep (the one given, or the recipe's or method's own) times each of these; None after a fault."""
    if not isinstance(times, list) or not times or not all(_is_number(t) and float(t) > 0 for t in times):
        faults.append(f"{what}: times is {times!r}, expected numbers above 0, such as [0.3, 1, 3]")
        return None
    try:
        settings = _settings(fields)
        own = getattr(settings, f"resolved_{rate}", None) or getattr(settings, rate)
        return [float(f"{float(own) * float(t):.4g}") for t in times]
    except (VeraError, AttributeError, TypeError, ValueError) as e:
        faults.append(f"{what}: {e if isinstance(e, VeraError) else f'there is no rate {rate} to multiply'}")
        return None


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def settings_of(cell: Cell, output: str | Path) -> Settings:
    """A cell's settings."""
    return _settings({**cell.settings, "output": output})


def _settings(given: Mapping[str, Any]) -> Settings:
    """Settings of plain fields, or of a recipe with the fields about it."""
    fields = {**given, **{name: _found(given[name]) for name in ("model", "data") if name in given}}
    if "recipe" not in fields:
        if "protocol" in fields:
            raise ConfigError("protocol belongs to a recipe: name one beside it (recipe: glue-rte-base)")
        return Settings(**fields)
    from ..recipes import settings_of as recipe_settings

    return recipe_settings(fields.pop("recipe"), fields.pop("method", "vera"), fields.pop("protocol", "published"), **fields)


def _found(name: Any) -> Any:
    """A path below VERALIB_DATA, where there is one; else the name as it is: a hub id, or a path of its own."""
    home = os.environ.get("VERALIB_DATA")
    if isinstance(name, str) and home and not Path(name).exists() and (Path(home) / name).exists():
        return str(Path(home) / name)
    return name


def _check(cell: Cell, faults: list[str]) -> Settings | None:
    try:
        return settings_of(cell, "unused")
    except VeraError as e:
        faults.append(f"{cell.task} {cell.name}: {e}")
        return None
