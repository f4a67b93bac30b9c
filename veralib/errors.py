"""Every error that veralib raises on purpose.

    VeraError
    ├── ConfigError        a setting is wrong: all faults of one config are listed at once (also a ValueError)
    ├── AdapterFileError   the file is truncated, damaged, not ours, or of a newer format
    ├── AdapterMismatch    a sound adapter, but for another base model
    ├── UnknownName        no adapter, target, method … of that name; the known ones and the nearest are listed (also a KeyError)
    ├── StateError         the call doesn't fit the present state: merged, already attached, wrong number of rows
    ├── TrainingDiverged   what a run trained isn't finite any more; `result` says the rest of what it did
    ├── DataError          a data set without the named columns, empty, or with labels never seen in training
    ├── EndpointError      an HTTP endpoint is down, refuses the key or the request, or doesn't answer in its protocol
    ├── StoreError         a store, or something in it, is damaged, of a newer format, or refused
    │   └── StoreUnavailable   the disk or the network beneath it doesn't read, write or list now
    └── MissingPackage     an optional package is needed; the message is the command that installs it (also an ImportError)

A message says what was found, what was expected, where, and the next step.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class VeraError(Exception):
    """Base of every error of veralib's own."""


class ConfigError(VeraError, ValueError):
    """A setting is wrong."""


class AdapterFileError(VeraError):
    """An adapter file can't be read or written."""


class AdapterMismatch(VeraError):
    """The adapter was trained on another base model."""


class UnknownName(VeraError, KeyError):
    """A name that nobody has; built by unknown_name()."""

    def __str__(self) -> str:  # KeyError prints repr(message), which hides line breaks
        return str(self.args[0]) if self.args else ""


class StateError(VeraError, RuntimeError):
    """The call doesn't fit the present state of the model."""


class TrainingDiverged(VeraError):
    """Training left NaN or inf."""

    def __init__(self, text: str, result: Any = None) -> None:
        super().__init__(text)
        self.result = result
        """The run's Result, its scores NaN; None in processes that keep none."""


class DataError(VeraError, ValueError):
    """A data set can't be used as it was given."""


class EndpointError(VeraError):
    """An HTTP endpoint didn't give an answer."""


class StoreError(VeraError):
    """A store, or something in it, can't be read or written, or is refused."""


class StoreUnavailable(StoreError):
    """What a store lies on can't be read, written or listed now; nothing says that it is damaged."""


class MissingPackage(VeraError, ImportError):
    """An optional package is missing."""


class VeraWarning(UserWarning):
    """Every warning of veralib's own."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?', or '' where nothing is close. Never the name itself, which may have been there a moment ago."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known if str(k) != str(name)], n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def unknown_text(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence: the unknown name, the nearest one, the known ones (the first twelve)."""
    known = [str(k) for k in known]
    shown = ", ".join(f'"{k}"' for k in known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    return f'there is no {kind} "{name}".{nearest(name, known)} Known: {shown or "none"}.'


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The UnknownName to raise for `name`."""
    text = unknown_text(kind, name, known)
    return UnknownName(text[0].upper() + text[1:])


def need(package: str, extra: str, what: str) -> MissingPackage:
    """The MissingPackage to raise where `what` needs `package`, which the extra installs."""
    return MissingPackage(f"{what} needs the package {package}: pip install 'veralib[{extra}]'")
