"""The plugin for vLLM: VeRA adapters by name from a store, thousands on one base model (docs/serving-vllm.md).

    python -m vllm.entrypoints.openai.api_server --model M --enable-lora --max-loras 32 --max-cpu-loras 10000 \\
        --additional-config '{"vera": {"store": "adapters", "max_rank": 256}}'

vLLM finds it by its entry point and calls register() in every process. Importing this package imports no vLLM.
"""

from typing import Any


def register() -> None:
    """Makes vLLM able to serve VeRA adapters. Without the setting "vera" in --additional-config nothing changes."""
    from .patches import install

    install()


def lora_request(store: Any, name: str) -> Any:
    """For vllm.LLM in one's own process: the LoRARequest of the current version of an adapter. UnknownName, StoreError.

    store: the same as in the setting "vera", which the workers read.
    """
    from vllm.lora.request import LoRARequest

    from ..names import engine_name
    from .wire import STORE, request_id

    current = engine_name(store, name)
    return LoRARequest(current, request_id(current), STORE + current)
