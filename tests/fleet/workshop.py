"""A small fleet: six owners, each with sentences of an own animal, and the settings of a run of theirs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from veralib.fleet.settings import FleetSettings

SIZES = {"ann": 40, "bob": 5, "c/../d": 17, "🦆": 9, "eve": 23, "one": 1}


def sentences(owner: str, count: int, seed: int = 0) -> list[dict]:
    """Each owner says the same things of other animals, in sentences of several lengths."""
    chooser = random.Random(f"{owner}/{seed}")
    animal = ["cat", "dog", "bird", "fish"][sum(map(ord, owner)) % 4]
    word = lambda: ["the", animal, "likes", "the", chooser.choice(["red", "blue"]), "house"]  # noqa: E731
    texts = [" ".join(w for _ in range(chooser.randint(1, 4)) for w in word()) for _ in range(count)]
    return [{"owner": owner, "text": text} for text in texts]


def changed(settings: FleetSettings, **changes) -> FleetSettings:
    return FleetSettings(**{**{n: getattr(settings, n) for n in settings.model_fields_set}, **changes})


def flat(store, name: str) -> torch.Tensor:
    return torch.cat([t for pair in store.get(name).vectors.values() for t in pair])


def worker(settings: FleetSettings, *arguments: str, launcher: tuple[str, ...] = ()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "tests.fleet.worker"] if not launcher else [sys.executable, *launcher]
    values = json.dumps({n: v for n, v in settings.to_dict().items() if n in settings.model_fields_set})
    root = Path(__file__).parents[2]
    return subprocess.run([*command, values, *arguments], capture_output=True, text=True, env=environment, cwd=root)
