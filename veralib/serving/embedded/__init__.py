"""The embedded engine: a model in this process with the adapters of a store, on transformers, for laptops, tests and the demo.

    with EmbeddedEngine("models/books-4m", open_store("adapters")) as engine:
        engine.generate(["Once upon a time"] * 3, models=["ann", "bob", None])

`python -m veralib.serving.embedded --model M --store S` serves it over HTTP in vLLM's dialect.
"""

from .engine import EmbeddedEngine
from .errors import BadAdapter, BadRequest, EngineBusy, EngineError
from .request import Completion, Piece
from .sampling import Logprob, Sampling

__all__ = [
    "BadAdapter",
    "BadRequest",
    "Completion",
    "EmbeddedEngine",
    "EngineBusy",
    "EngineError",
    "Logprob",
    "Piece",
    "Sampling",
]
