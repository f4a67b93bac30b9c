"""The one setting of the plugin: --additional-config '{"vera": {"store": …}}', which vLLM hashes and hands to every process."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...adapter import Adapter
from ...errors import AdapterMismatch, ConfigError, nearest


@dataclass(frozen=True)
class Settings:
    """What a server with VeRA adapters is told."""

    store: str
    """The folder or fsspec URL of the store that names adapters."""
    max_rank: int = 256
    """The largest rank of any adapter; smaller ones are filled up with zeros, which changes nothing. The tables are this wide."""
    max_bases: int = 1
    """How many different pairs A, B (seeds, kinds) are in memory at once."""
    check_every: float = 0.0
    """For how many seconds a version counts as the current one without asking the store. 0 asks for each request."""

    def __post_init__(self) -> None:
        if wrong := list(_faults(self)):
            raise ConfigError('the setting "vera" in --additional-config: ' + "; ".join(wrong) + ".")


def _faults(s: Settings):
    if not isinstance(s.store, str) or not s.store:
        yield f"store is {s.store!r}, expected a folder or an fsspec URL"
    for name in ("max_rank", "max_bases"):
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{name} is {value!r}, expected a whole number above 0"
    if not isinstance(s.check_every, (int, float)) or isinstance(s.check_every, bool) or not s.check_every >= 0:
        yield f"check_every is {s.check_every!r}, expected seconds, 0 or more"


def settings_of(vllm_config: Any) -> Settings | None:
    """The plugin's settings in a VllmConfig; None where there are none, and then vLLM is as it always was."""
    additional = getattr(vllm_config, "additional_config", None)
    given = additional.get("vera") if isinstance(additional, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f'the setting "vera" in --additional-config is {given!r}, expected {{"store": …}}.')
    known = [f.name for f in fields(Settings)]
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(
            f'the setting "vera" in --additional-config has no field "{unknown[0]}".{nearest(unknown[0], known)} '
            f"Known: {', '.join(known)}."
        )
    return Settings(**{"store": None, **given})


def check_with_lora(vllm_config: Any) -> None:
    """ConfigError where vLLM's own LoRA settings don't go with the plugin."""
    lora = vllm_config.lora_config
    if lora is None:
        raise ConfigError('the setting "vera" needs vLLM\'s LoRA support: add --enable-lora --max-loras N --max-cpu-loras M.')
    for name, why in (
        ("fully_sharded_loras", "A and B are sharded as the layers are"),
        ("enable_tower_connector_lora", "adapters go on the language model alone"),
    ):
        if getattr(lora, name, False):
            raise ConfigError(f"--{name.replace('_', '-')} doesn't go with VeRA adapters: {why}. Leave it out.")


def check_servable(adapter: Adapter, name: str, settings: Settings) -> None:
    """AdapterMismatch where no server with these settings can serve the adapter, whatever the model."""
    if adapter.modules:
        raise AdapterMismatch(
            f'adapter "{name}" carries fully trained modules ({", ".join(sorted(adapter.modules)[:3])}): a server shares every '
            "module among all adapters. Merge it, or train without train_modules."
        )
    if adapter.biases:
        raise AdapterMismatch(
            f'adapter "{name}" carries biases of its own (PEFT\'s bias="vera_only"), which a server shares among all adapters. '
            'Merge it, or train with bias="none".'
        )
    if adapter.layer_ids or adapter.config.sharing == "unique":
        raise AdapterMismatch(
            f'adapter "{name}" has sharing="unique", a pair A, B for each layer: a server holds shared pairs only. Merge it, or '
            'train with sharing="shared".'
        )
    rank = max(len(d) for d, _ in adapter.vectors.values())
    if rank > settings.max_rank:
        raise AdapterMismatch(
            f'adapter "{name}" has rank {rank}, and this server takes up to {settings.max_rank}: start it with '
            f'"max_rank": {rank} in the setting "vera".'
        )
