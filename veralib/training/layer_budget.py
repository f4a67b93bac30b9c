"""Ranks by layer from a total: a short warm-up shows which layers move, and they get more of it. `vera budget` is this.

The paper leaves a budget by layer to future work. A rank costs one parameter in every layer (a layer trains m + r), so a total of
ranks is a total of parameters, whatever the layers' shapes.
"""

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .settings import Settings

By = Literal["change", "gradient"]


def allocate(scores: Mapping[str, float], total: int, least: int = 4) -> dict[str, int]:
    """A rank for each layer, `total` in all: `least` for everyone, the rest in proportion to the scores, by largest remainder."""
    _check(total, len(scores), least)
    if wrong := [name for name, score in scores.items() if not math.isfinite(score) or score < 0]:
        raise ConfigError(f'the score of "{wrong[0]}" is {scores[wrong[0]]}, expected a finite number, 0 or more')
    whole = sum(scores.values())
    rest = total - least * len(scores)
    shares = {name: rest * (score / whole if whole else 1 / len(scores)) for name, score in scores.items()}
    ranks = {name: least + math.floor(share) for name, share in shares.items()}
    left = sorted(shares, key=lambda name: math.floor(shares[name]) - shares[name])
    for name in left[: total - sum(ranks.values())]:
        ranks[name] += 1
    return ranks


def _check(total: int, layers: int, least: int) -> None:
    if least < 1:
        raise ConfigError(f"least is {least}, expected 1 or more")
    if total < least * layers:
        raise ConfigError(f"a total of {total} ranks gives {layers} layers less than {least} each: raise it, or lower `least`.")


def measure(settings: Settings, by: By = "change", steps: int = 50, total: int | None = None, least: int = 4) -> dict[str, float]:
    """Each layer's score after a warm-up of `steps` steps: ‖d − d₀‖₂ with "change", or the mean of ‖d ∘ ∂d‖₁ over the steps with
    "gradient", the first-order change of the loss if d's entries were removed. Nothing is kept of the warm-up.

    total, least: what allocate will be asked for, refused before the first step where it can't be given.
    """
    from .. import handle
    from .run import train

    if settings.method != "vera":
        raise ConfigError(f'a budget of ranks by layer is VeRA\'s, and the method is "{settings.method}"')
    if by not in ("change", "gradient"):
        raise ConfigError(f'by is "{by}", expected change or gradient')
    if steps < 1:
        raise ConfigError(f"steps is {steps}, expected 1 or more for the warm-up")
    from transformers import TrainerCallback

    scores: dict[str, float] = {}

    class Watch(TrainerCallback):
        def _vectors(self, model: Any) -> list[tuple[str, Any]]:
            member = handle(model).members["default"]
            return [(u.unit, member.vectors(u.unit)[0]) for u in member.layout.units]

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if total is not None:
                _check(total, len(self._vectors(model)), least)
            self.start = {unit: d.detach().clone() for unit, d in self._vectors(model)}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if by == "gradient":
                for unit, d in self._vectors(model):
                    moved = 0.0 if d.grad is None else float((d.detach() * d.grad).abs().sum())
                    scores[unit] = scores.get(unit, 0.0) + moved / steps

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if by == "change":
                scores.update({unit: float((d.detach() - self.start[unit]).norm()) for unit, d in self._vectors(model)})

    with tempfile.TemporaryDirectory() as scratch:
        warm = {
            "evaluate_every": "never",
            "save_every": "never",
            "plot": False,
            "best": False,
            "patience": None,
            "resume": False,
            "test": None,
        }
        training = {**settings.training, "max_steps": steps}
        train(settings.replace(**warm, training=training, output=str(Path(scratch) / "run")), callbacks=[Watch()])
    return scores


def ranks_of(settings: Settings, total: int, by: By = "change", steps: int = 50, least: int = 4) -> dict[str, int]:
    """The `rank` setting that gives each layer its share: {pattern: rank}, each pattern one layer's whole name."""
    scores = measure(settings, by, steps, total, least)
    return {f"^{re.escape(layer)}$": rank for layer, rank in allocate(scores, total, least).items()}
