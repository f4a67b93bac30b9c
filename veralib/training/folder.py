"""The output folder of a run: whose it is, and whether something interrupted waits in it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StateError, need
from .settings import Settings

# Settings that may differ between the parts of one interrupted run.
FREE = {"output", "resume", "plot", "keep_checkpoints"}


def check_output(settings: Settings, folder: Path) -> None:
    """Refuses what would only fail after the training."""
    if (folder / "result.json").exists() and settings.resume is not False:
        raise StateError(
            f"{folder} holds a finished run. Name another output folder, or start anew with resume: no (--no-resume)."
        )
    if settings.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError as e:
            raise need("matplotlib", "cli", "plot.png (or set plot: no)") from e
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(f"can't write to the output folder {folder}: {e.strerror or e}") from e


def open_run(settings: Settings, folder: Path, hashes: Mapping[str, str]) -> int:
    """Marks the folder as this run's; how often the run was interrupted before. StateError where it is another's."""
    mark = folder / "run.json"
    mine = {"settings": {k: v for k, v in settings.to_dict().items() if k not in FREE}, "data": dict(hashes)}
    resumed = 0
    if settings.resume is False:
        for name in ("result.json", "run.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    elif mark.exists():
        try:
            old = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            old = {"settings": {}, "data": {}}
        changed = [
            f"{part}: {k} was {old[part].get(k)!r}, now {mine[part].get(k)!r}"
            for part in ("settings", "data")
            for k in sorted({*old[part], *mine[part]})
            if old[part].get(k) != mine[part].get(k)
        ]
        if changed and not any((folder / "checkpoints").glob("checkpoint-*")):
            old = {"resumed": -1}  # it never took a step that was kept: a setting was wrong, and now it is another run
        elif changed:
            raise StateError(
                f"{folder} holds an interrupted run of other settings or data; start anew with resume: no (--no-resume), or name "
                "another output folder. Different: " + "; ".join(changed[:8])
            )
        resumed = int(old.get("resumed", 0)) + 1
    elif settings.resume:
        raise StateError(f"resume: {folder} holds no interrupted run")
    write_json(mark, {**mine, "resumed": resumed})
    return resumed


def times_resumed(folder: Path) -> int:
    """How often the run in this folder went on, as open_run wrote it."""
    return int(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("resumed", 0))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints, under torchrun or alone."""
    return int(os.environ.get("RANK", 0)) == 0


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under another name, then renames it: the file is whole or as it was."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
