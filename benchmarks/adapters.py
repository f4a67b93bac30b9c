"""Loading the 1st and the last of many adapters, switching between them, and what one more costs in memory."""

import contextlib
import ctypes
import gc
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import measure
from .models import SEED, SHAPES, Contestant, base_model, contest

LOAD_GOAL_MS, SWITCH_GOAL_MS, MEMORY_GOAL = 2.5, 0.1, 1.05


@dataclass(frozen=True)
class Row:
    """One contestant and how many of its adapters are loaded into one model."""

    contestant: Contestant
    count: int

    @property
    def name(self) -> str:
        """The contestant's key in the result file."""
        return self.contestant.name


# PEFT's own loading slows down with each adapter, so 100 of them show what there is to see.
ROWS = [
    Row(Contestant("veralib", 256), 1000),
    Row(Contestant("peft-vera", 256), 100),
    Row(Contestant("lora", 1), 100),
    Row(Contestant("lora", 8), 100),
]
QUICK = [Row(Contestant("veralib", 8), 8), Row(Contestant("peft-vera", 8), 8), Row(Contestant("lora", 1), 8)]


def run(rows: list[Row], shape: str = "llama", log: Callable[[str], None] = print, *, own_process: bool = True) -> dict[str, Any]:
    """The result: for each row milliseconds to load the 1st and the last, to switch, and bytes per further adapter.

    own_process: each row in a new process, for resident memory says nothing where another row's has just been freed.
    """
    before = measure.environment()
    found = {}
    for row in rows:
        if own_process:
            found[row.name] = measure.in_own_process(measure_row, row, shape, torch.get_num_threads())
        else:
            found[row.name] = measure_row(row, shape, torch.get_num_threads())
        facts = found[row.name]
        first, last = facts["load_first_ms"]["median"], facts["load_last_ms"]["median"]
        switch = facts["switch_ms"]["median"]
        log(f"  {row.name}: 1st {first:.2f} ms, {row.count}th {last:.2f} ms, switch {switch:.4f} ms")
    return {
        "run": "adapters",
        "seed": SEED,
        "shape": shape,
        "goals": {"load_ms": LOAD_GOAL_MS, "switch_ms": SWITCH_GOAL_MS, "memory": MEMORY_GOAL},
        "environment": before | {"load_average_after": measure.environment()["load_average"]},
        "contestants": found,
    }


def measure_row(row: Row, shape: str, threads: int) -> dict[str, Any]:
    """One row's facts, in the process that calls it."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="veralib-bench-") as folder:
        if row.contestant.method == "veralib":
            return _veralib(row, shape, Path(folder))
        return _peft(row, shape, Path(folder))


def _veralib(row: Row, shape_name: str, folder: Path) -> dict[str, Any]:
    import veralib
    from veralib import basis

    shape = SHAPES[shape_name]
    model = base_model(shape)
    config = veralib.VeraConfig(rank=row.contestant.rank, targets=shape.targets)
    generation = [_ms(_generate, basis, model, config) for _ in range(3)]
    vera = veralib.attach(model, config, name="first")
    adapter = vera.adapter("first")
    vera.detach()
    paths = [folder / f"{k}.safetensors" for k in range(row.count)]
    for path in paths:
        vectors = {unit: (torch.rand_like(d), torch.rand_like(b)) for unit, (d, b) in adapter.vectors.items()}
        veralib.save_adapter(replace(adapter, vectors=vectors), path)

    first, second = [], []
    for k in range(0, 12, 2):
        vera = veralib.attach(model)
        first.append(_ms(vera.load, paths[k % row.count], "first"))
        second.append(_ms(vera.load, paths[(k + 1) % row.count], "second"))
        vera.detach()
    vera = veralib.attach(model)
    facts = _load_and_switch(
        range(row.count), lambda k: vera.load(paths[k], name=str(k)), lambda k: vera.use(str(k))
    )  # fmt: skip
    facts |= {"load_first_ms": measure.spread(first[1:]), "load_second_ms": measure.spread(second[1:])}
    return facts | {
        "count": row.count,
        "basis_generation_ms": measure.spread(generation),
        "read_and_copy_ms": measure.spread([_ms(_read, p) for p in paths[: min(50, row.count)]]),
        "adapter_bytes": adapter.bytes,
        "file_bytes": paths[0].stat().st_size,
    }


def _generate(basis: Any, model: torch.nn.Module, config: Any) -> None:
    basis.clear_cache()
    sizes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    pair = basis.Basis(seed=config.seed)
    pair.A(config.rank, max(n for _, n in sizes))
    pair.B(max(m for m, _ in sizes), config.rank)


def _peft(row: Row, shape_name: str, folder: Path) -> dict[str, Any]:
    import peft
    from safetensors.torch import load_file

    shape = SHAPES[shape_name]
    base = base_model(shape)
    source = folder / "source"
    contest(base, shape, row.contestant).save_pretrained(str(source))  # type: ignore[operator]
    folders = [shutil.copytree(source, folder / str(k)) for k in range(row.count)]
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    # A and B are shared by all adapters, so they aren't what one more should cost.
    own = sum(t.nbytes for name, t in tensors.items() if not name.endswith(("vera_A", "vera_B")))

    first, second = [], []
    for k in range(0, 12, 2):
        plain, one, two = base_model(shape), str(folders[k % row.count]), str(folders[(k + 1) % row.count])
        start = measure.clock()
        model = peft.PeftModel.from_pretrained(plain, one)
        first.append(1e3 * (measure.clock() - start))
        second.append(_ms(model.load_adapter, two, "second"))
    model = peft.PeftModel.from_pretrained(base, str(folders[0]), adapter_name="0")
    # PEFT makes a model of base and adapter at once, so memory is counted from the second adapter on.
    facts = _load_and_switch(
        range(1, row.count), lambda k: model.load_adapter(str(folders[k]), str(k)), lambda k: model.set_adapter(str(k))
    )  # fmt: skip
    facts |= {"load_first_ms": measure.spread(first[1:]), "load_second_ms": measure.spread(second[1:])}
    return facts | {"count": row.count, "adapter_bytes": own, "file_bytes": file.stat().st_size}


def _load_and_switch(numbers: range, load: Callable[[int], Any], use: Callable[[int], Any]) -> dict[str, Any]:
    """Loads each number's adapter, switches between them; what the last loads and all the memory came to."""
    tail = max(2, min(20, len(numbers) // 5))
    tensors, resident = _tensor_bytes(), _resident_bytes()
    loads = [_ms(load, k) for k in numbers]
    tensors, resident = _tensor_bytes() - tensors, _resident_bytes() - resident
    chooser = random.Random(SEED)
    return {
        "load_last_ms": measure.spread(loads[-tail:]),
        "loads_in_last": tail,
        "switch_ms": measure.spread([_ms(use, chooser.choice(numbers)) for _ in range(300)]),
        "tensor_bytes_per_adapter": tensors / len(numbers),
        "resident_bytes_per_adapter": resident / len(numbers),
    }


def _ms(act: Callable[..., Any], *arguments: Any) -> float:
    start = measure.clock()
    act(*arguments)
    return 1e3 * (measure.clock() - start)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The least a loader must do: read the file, copy its tensors."""
    from safetensors.torch import load_file

    return {name: t.clone() for name, t in load_file(path).items()}


def _tensor_bytes() -> int:
    """Bytes of all live tensors of this process, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t.layout == torch.strided)}.values())


def _resident_bytes() -> int:
    """The process's resident memory, after what the allocator holds in vain is given back."""
    import psutil

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's own; elsewhere the number is a little higher
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss
