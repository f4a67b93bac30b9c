"""Scores of generated text against several references each, and the texts they are made from. `vera evaluate`."""

from .run import Evaluation, Item, evaluate, evaluate_base, read_items
from .scores import score

__all__ = ["Evaluation", "Item", "evaluate", "evaluate_base", "read_items", "score"]
