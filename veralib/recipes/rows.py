"""What a recipe is: the settings that a paper prints for one cell of its tables, as one typed row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Protocol = Literal["published", "honest"]
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a recipe's data are. hub, local: the settings that read each form; the local form is the original files."""

    hub: Fields
    folder: str | None = None
    """A folder or file below VERALIB_DATA."""
    local: Fields = field(default_factory=dict)
    dev: tuple[str, str] | None = None
    """The development split's name in the hub's form and in the local one; None: there is no protocol to choose."""


@dataclass(frozen=True)
class Recipe:
    """One cell. common: settings of every method; methods: what differs by method, as published; source: where it is printed."""

    name: str
    title: str
    source: str
    model: str
    data: Source
    common: Fields
    methods: Mapping[str, Fields]
    processes: int = 1
    """GPUs of the published run; on fewer, gradients are accumulated to the same batch."""
    like: Mapping[str, str] = field(default_factory=lambda: {"lora_fa": "lora"})
    """Method without a published row -> the method whose row it takes, which is our choice."""
    notes: tuple[str, ...] = ()
    """What the source leaves open, and what is taken here."""

    def row(self, method: str) -> Fields:
        """What a method has beside the common settings: its own row, or the one that it takes; empty where there is none."""
        return self.methods.get(method) or self.methods.get(self.like.get(method, ""), {})
