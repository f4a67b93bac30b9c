"""Attached: the one contract of every method that a run can train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import AdapterMismatch

if TYPE_CHECKING:
    from ..merge_report import MergeReport

Notes = Mapping[str, str]
MORE = "more."


@dataclass(frozen=True)
class Attached:
    """A model that one method has made trainable.

    The run asks for nothing else: which parameters train, at which of the two rates, and how the result is written.
    """

    model: nn.Module
    """What is called and trained: the model itself, or a wrapper around it."""
    adapter: tuple[nn.Parameter, ...]
    """Trained at lr. The parameters that the paper counts."""
    head: tuple[nn.Parameter, ...]
    """Trained at lr_head: a classification head, which the paper doesn't count."""
    save: Callable[[Path, Notes], list[Path]]
    """Writes the result into a folder, with free text beside it where the format has room; the files it wrote."""
    load: Callable[[Path], None]
    """Reads what save wrote back into the model."""
    merge: "Callable[[], MergeReport | None] | None" = None
    """Writes the result into the weights of the model that was attached, which is a plain one again; how much of the change
    their precision kept, None where the method trained the weights themselves. None: the method can't be merged."""
    penalty: Callable[[], Tensor] | None = None
    """What the method adds to the training loss; the model adds it to a loss of its own, not to one that Trainer counts."""
    counted: Callable[[], int] | None = None
    """The parameters that stay, where training drops some of them: what the paper counts."""
    begin: Callable[[int], object] | None = None
    """Called with the number of steps before the first."""
    before_step: Callable[[int], object] | None = None
    """Called with the steps taken before each one's forward."""
    after_step: Callable[[int], object] | None = None
    """Called with the steps taken after each one, while the gradients are there."""

    more: Callable[[], Mapping[str, Tensor]] | None = None
    """What training changes beside the trained tensors, by name: a run that goes on needs it."""
    load_more: Callable[[Mapping[str, Tensor]], None] | None = None
    """Writes more() back."""

    @property
    def trainable(self) -> tuple[nn.Parameter, ...]:
        """Every trained parameter, in a fixed order."""
        return self.adapter + self.head

    @property
    def adapter_parameters(self) -> int:
        """Trained numbers without the head; where training drops some, those that stay."""
        return self.counted() if self.counted is not None else sum(p.numel() for p in self.adapter)

    @property
    def head_parameters(self) -> int:
        """Trained numbers of the head."""
        return sum(p.numel() for p in self.head)

    def parameter_groups(self, lr: float, lr_head: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """An optimiser's groups. The head's biases and norms (one dimension) don't decay; an adapter's vectors do."""
        flat = [p for p in self.head if p.dim() < 2]
        rest = [p for p in self.head if p.dim() >= 2]
        groups = [
            {"params": list(self.adapter), "lr": lr, "weight_decay": weight_decay},
            {"params": rest, "lr": lr_head, "weight_decay": weight_decay},
            {"params": flat, "lr": lr_head, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by their place in `trainable`, and `more`'s: a checkpoint's content, for every method alike."""
        more = {} if self.more is None else {MORE + k: v for k, v in self.more().items()}
        return {f"{i:05d}": p.detach() for i, p in enumerate(self.trainable)} | more

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Writes state() back."""
        for i, p in enumerate(self.trainable):
            p.data.copy_(state[f"{i:05d}"])
        if self.load_more is not None:
            self.load_more({k.removeprefix(MORE): v for k, v in state.items() if k.startswith(MORE)})


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules whose running statistics move whenever the model trains. An adapter has no room for them, so a frozen base's
    must stay as they are, or the model that was measured isn't the one that was saved."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freeze(model: nn.Module, but: tuple[str, ...] = ()) -> tuple[nn.Parameter, ...]:
    """Freezes the model except the named modules; the parameters that stay trainable."""
    left = []
    for name, parameter in model.named_parameters():
        keep = any(name == b or name.startswith(b + ".") for b in but)
        parameter.requires_grad_(keep)
        if keep:
            left.append(parameter)
    return tuple(left)


def save_tensors(model: nn.Module, names: Callable[[str], bool], path: Path, notes: Notes) -> list[Path]:
    """Writes the entries of model.state_dict() that `names` accepts to one safetensors file."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if names(k)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={**notes, "format": "pt"})
    return [path]


def load_tensors(model: nn.Module, names: Callable[[str], bool], path: Path) -> None:
    """Reads save_tensors' file back into the model. AdapterMismatch, and nothing read, where it holds other entries."""
    from safetensors.torch import load_file

    found, wanted = load_file(path), {key for key in model.state_dict() if names(key)}
    kind = f"this {type(model).__name__}"
    if unknown := [key for key in found if key not in wanted]:
        raise AdapterMismatch(f'{path} holds "{unknown[0]}", which {kind} doesn\'t have: give the base that it was trained on.')
    if missing := [key for key in sorted(wanted) if key not in found]:
        raise AdapterMismatch(f'{path} lacks "{missing[0]}", which {kind} has: give the base that it was trained on.')
    model.load_state_dict(found, strict=False)
