"""What a run can train: VeRA and the methods it is compared with. One file a method, one contract: see base.Attached.

A method is `attach(model, settings, head) -> Attached`: it freezes what it doesn't train. `head` names the modules that are
trained in full beside it (a classification head), in all methods alike.
"""

from .full import attach_full
from .head import attach_head
from .lora import attach_lora
from .vera import attach_vera

METHODS = {
    "vera": attach_vera,
    "lora": attach_lora,
    "head": attach_head,
    "full": attach_full,
}
