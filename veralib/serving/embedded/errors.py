"""What an embedded engine refuses, beside veralib's own errors."""

from ...errors import ConfigError, UnknownName, VeraError


class EngineError(VeraError, RuntimeError):
    """The engine can't answer: it has stopped, or an answer broke off."""


class EngineBusy(VeraError):
    """Too much at once: ask again."""


class BadRequest(ConfigError):
    """A request's values are wrong. param: the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadAdapter(VeraError):
    """An adapter of that name exists and can't be used here: damaged, for another base, or of a kind that isn't served."""


def unknown_model(name: str) -> UnknownName:
    """The UnknownName for a model's name. It lists no other name: those may be another tenant's."""
    return UnknownName(f'there is no model "{name[:200]}".')
