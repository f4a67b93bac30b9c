"""The output folder of a fleet: whose it is, who is done, and where those in training stand.

run.json             the settings, and the labels where there are heads
owners-<rank>.jsonl  a line for each owner that ended, written after its adapter is in the store
standing-<rank>.safetensors   those in a slot, every minute
progress-<rank>.jsonl         their steps and losses, where progress_seconds is set
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import StateError, StoreError, StoreUnavailable, UnknownName
from ..store import open_store
from ..store.folder import ABOUT
from ..training.folder import write_json
from .data import kept_file
from .settings import FleetSettings

# What may differ between two runs into one folder: none of it changes what an owner's adapter becomes.
FREE = {"output", "data", "split", "data_config", "slots", "batch_rows", "plot", "keep_data", "store_kind", "precision"}
FREE |= {"progress_seconds"}
TENSORS = ("row", "exp_avg", "exp_avg_sq", "best_row")


def check_folder(settings: FleetSettings, folder: Path) -> None:
    """StateError where the folder is a run's of other settings."""
    if (folder / "run.json").exists():
        old, mine = read_settings(folder), _written(settings)
        old["store"] = _absolute(old.get("store"))
        changed = [f"{k} was {old[k]!r}, now {v!r}" for k, v in mine.items() if k in old and k not in FREE and old[k] != v]
        if changed:
            raise StateError(
                f"{folder} holds a fleet of other settings; name another output folder. Different: {'; '.join(changed[:8])}"
            )


def open_folder(settings: FleetSettings, folder: Path, labels: Sequence[str] = ()) -> None:
    """Makes the folder this run's. StateError where it is one of other settings. Labels are those of its first run."""
    check_folder(settings, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"settings": _written(settings), "labels": read_labels(folder) or list(labels)})
    except OSError as e:
        raise StateError(f"can't write to the output folder {folder}: {e.strerror or e}.") from e


def _written(settings: FleetSettings) -> dict[str, Any]:
    return {**settings.to_dict(), "store": _absolute(settings.store)}


def _absolute(store: str | None) -> str | None:
    """A store's name that means the same from every working folder."""
    return os.path.abspath(store) if store and "://" not in store else store


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a fleet's folder was made with. StateError where it is none."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as e:
        raise StateError(f"{folder} holds no fleet: there is no readable run.json. Name the output folder of a run.") from e


def read_labels(folder: Path) -> tuple[str, ...]:
    """The labels that a fleet's heads were made for; none where there is no run yet, or no head."""
    mark = folder / "run.json"
    return tuple(json.loads(mark.read_text(encoding="utf-8")).get("labels", ())) if mark.exists() else ()


def ended(folder: Path) -> dict[str, dict[str, Any]]:
    """Owner -> its last line in owners-*.jsonl. A line that a crash cut is left out: its owner trains again."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("owners-*.jsonl")):
        for line in _lines(path):
            if line["name"] not in found or line["ended"] >= found[line["name"]]["ended"]:
                found[line["name"]] = line
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def add_ended(folder: Path, rank: int, line: Mapping[str, Any]) -> None:
    """One more line, on the disk when it returns."""
    path = folder / f"owners-{rank}.jsonl"
    try:
        with open(path, "a+b") as f:
            f.seek(0, os.SEEK_END)
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # a line that a crash cut
                    f.write(b"\n")
            f.write(json.dumps(dict(line)).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise StateError(f"can't write {path}: {e.strerror or e}. What ended before is kept: free space, run again.") from e


def standing_file(folder: Path, whose: int | str) -> Path:
    """Of a process, by its rank; "shared": of the shared start."""
    return folder / (f"standing-{whose}.safetensors" if isinstance(whose, int) else f"{whose}-standing.safetensors")


def save_standing(path: Path, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Where those in a slot stand, in place of what was there."""
    tensors: dict[str, torch.Tensor] = {}
    numbers = []
    for i, (name, mine) in enumerate(state.items()):
        tensors |= {f"{i}.{k}": v for k, v in mine.items() if k in TENSORS}
        numbers.append({"name": name, **{k: v for k, v in mine.items() if k not in TENSORS}})
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"owners": json.dumps(numbers)})
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise StateError(f"can't write {path}: {e.strerror or e}. What ended before is kept: free space, run again.") from e


def standing(folder: Path, shared: bool = False) -> dict[str, dict[str, Any]]:
    """Owner -> state, of every process of an interrupted run; or of its shared start."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("shared-standing.safetensors" if shared else "standing-*.safetensors")):
        for name, state in _standing_in(path).items():
            if name not in found or state["taken"] >= found[name]["taken"]:  # another rank's file may be of an earlier run
                found[name] = state
    return found


def _standing_in(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    with safe_open(path, "pt") as f:
        for i, numbers in enumerate(json.loads(f.metadata()["owners"])):
            tensors: dict[str, torch.Tensor] = {k: f.get_tensor(f"{i}.{k}") for k in TENSORS if f"{i}.{k}" in f.keys()}  # noqa: SIM118
            found[numbers["name"]] = {**numbers, **tensors}
    return found


def forget_owner(folder: Path, name: str) -> int:
    """Removes all that a fleet's folder holds of one owner, in its own store too; the run must not be going on. How many things
    that were: versions, kept rows, lines, a place in a slot. StateError, and nothing removed, where its store is gone."""
    given, gone = read_settings(folder)["store"], 0
    where = given or str(folder / "store")
    if "://" in where or (Path(where) / ABOUT).exists():
        store = open_store(where)
        if name in store:
            try:
                gone += len(store.versions(name))
            except UnknownName:
                pass
            except StoreUnavailable:
                raise
            except StoreError:  # what is damaged goes too
                gone += 1
            store.delete(name)
    elif given:
        raise StateError(
            f"{where}, the store that the fleet in {folder} fills, isn't there; nothing was removed. Bring it back first."
        )
    if (kept := kept_file(folder, name)).exists():
        kept.unlink()
        gone += 1
    for path in folder.glob("owners-*.jsonl"):
        lines = list(_lines(path))
        left = [line for line in lines if line["name"] != name]
        gone += len(lines) - len(left)
        _replace(path, "".join(json.dumps(line) + "\n" for line in left))
    for path in folder.glob("progress-*.jsonl"):
        left = [{**line, "owners": {n: at for n, at in line["owners"].items() if n != name}} for line in _lines(path)]
        _replace(path, "".join(json.dumps(line) + "\n" for line in left))
    for path in folder.glob("standing-*.safetensors"):
        with safe_open(path, "pt") as f:
            there = name in (numbers["name"] for numbers in json.loads(f.metadata()["owners"]))
        if there:
            save_standing(path, {n: state for n, state in _standing_in(path).items() if n != name})
            gone += 1
    if (folder / "fleet.json").exists():
        result = json.loads((folder / "fleet.json").read_text(encoding="utf-8"))
        for part in ("owners", "unusable"):
            gone += result[part].pop(name, None) is not None
        write_json(folder / "fleet.json", result)
    return gone


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def forget_standing(folder: Path) -> None:
    """Nobody is in a slot any more."""
    for path in folder.glob("*standing*.safetensors"):
        path.unlink(missing_ok=True)
