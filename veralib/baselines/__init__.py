"""What a run can train: VeRA and the methods it is compared with. One file a method, one contract: see base.Attached.

A method is `attach(model, settings, head) -> Attached`: it freezes what it doesn't train. `head` names the modules that are
trained in full beside it (a classification head), in all methods alike.
"""

from collections.abc import Callable
from typing import Any

from ..errors import unknown_name
from .base import Attached
from .bitfit import attach_bitfit
from .bottleneck import attach_adapter_d, attach_adapter_h, attach_adapter_l, attach_adapter_p
from .dvora import attach_dvora
from .dylora import attach_dylora
from .full import attach_full
from .head import attach_head
from .lora_xs import attach_lora_xs
from .peft import PREFIX, attach_adalora, attach_any, attach_lora, attach_lora_fa
from .vera import attach_vera

METHODS: dict[str, Callable[..., Attached]] = {
    "vera": attach_vera,
    "dvora": attach_dvora,
    "lora": attach_lora,
    "lora_fa": attach_lora_fa,
    "lora_xs": attach_lora_xs,
    "dylora": attach_dylora,
    "adalora": attach_adalora,
    "adapter_h": attach_adapter_h,
    "adapter_p": attach_adapter_p,
    "adapter_l": attach_adapter_l,
    "adapter_d": attach_adapter_d,
    "bitfit": attach_bitfit,
    "head": attach_head,
    "full": attach_full,
}


def find_method(name: str) -> Callable[..., Any]:
    """The method of that name, or peft:TYPE for any of PEFT's. UnknownName, ConfigError."""
    if name.startswith(PREFIX):
        return attach_any(name)
    if name not in METHODS:
        raise unknown_name("method", name, [*METHODS, "peft:TYPE"])
    return METHODS[name]
