"""The demo's rows. Rates, targets and epochs are each method's best on the validation split: results/demo/tuning.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The same for every method. 32 tokens hold all but a few of the sentences (at most 24 words).
COMMON: dict[str, Any] = {
    "batch_size": 16,
    "max_length": 32,
    "group_by_length": True,
    "evaluate_every": "never",
    "save_every": "never",
    "plot": False,
}
ALL = {"targets": "all-linear"}


@dataclass(frozen=True)
class Method:
    """One row: a name for people and the settings of its run."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "head": Method("head only", {"method": "head", "lr_head": 0.3, "epochs": 3}),
    "lora-r1": Method("LoRA r=1", {"method": "lora", "rank": 1, **ALL, "lr": 3e-3, "lr_head": 1e-2, "epochs": 3}),
    "lora-r8": Method("LoRA r=8", {"method": "lora", "rank": 8, **ALL, "lr": 3e-3, "lr_head": 1e-2, "epochs": 3}),
    "vera": Method("VeRA r=256", {"method": "vera", "rank": 256, **ALL, "lr": 3e-2, "lr_head": 1e-2, "epochs": 3}),
    "full": Method("all weights", {"method": "full", "lr": 3e-4, "lr_head": 1e-2, "epochs": 3}),
}
