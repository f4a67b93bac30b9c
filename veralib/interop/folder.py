"""The two files of a folder that PEFT saves, adapter_config.json and adapter_model.safetensors: read, checked, written."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapter import Adapter
from ..errors import AdapterFileError, AdapterMismatch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
# Wrappers that leave their name inside the keys when a model is saved from within them.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Settings of PEFT's that VeraConfig has no field for; they travel in Adapter.notes, so that a round trip keeps them.
NOTED = ("task_type", "fan_in_fan_out")


def is_peft_folder(path: str | Path) -> bool:
    """Whether the folder is one that PEFT (or write_peft, to_lora) saved."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json. AdapterFileError where there is none, or no JSON object."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder} holds no {CONFIG_FILE}, so it is no folder that PEFT saved.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise AdapterFileError(f"{path} can't be read: {e}. Copy the adapter again from where it came.") from e
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a JSON {type(fields).__name__}, expected an object of PEFT's settings.")
    check_method(fields, str(folder))  # before the tensors: another method's may be large, or missing
    return fields


def method_of(fields: Mapping[str, Any]) -> str:
    """PEFT's name of the method, "VERA" for one; its enum's str() would be "PeftType.VERA"."""
    method = fields.get("peft_type")
    return str(getattr(method, "value", method))


def check_method(fields: Mapping[str, Any], where: str) -> None:
    """Raises AdapterFileError where the folder holds another method's adapter than VeRA's."""
    if (method := method_of(fields)) != "VERA":
        raise AdapterFileError(
            f"{where} holds an adapter of PEFT's method {method} (peft_type in {CONFIG_FILE}); veralib reads VERA alone. "
            "Load it with peft.PeftModel.from_pretrained."
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors by name, from safetensors or PyTorch's format, on the CPU. AdapterFileError."""
    from safetensors.torch import load_file

    path = next((folder / name for name in (WEIGHTS_FILE, PICKLE_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise AdapterFileError(f"{folder} holds a {CONFIG_FILE} but neither {WEIGHTS_FILE} nor {PICKLE_FILE}.")
    try:
        if path.name == WEIGHTS_FILE:
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # every reader has errors of its own for damaged bytes
        raise AdapterFileError(f"{path} can't be read: {e}. Copy the adapter again from where it came.") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(f"{path} holds no mapping of names to tensors, as PEFT writes it.")
    return tensors


def plain_key(key: str) -> str:
    """The key without PEFT's prefix (twice where a PeftModel was wrapped again) and without wrappers' names."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    key = key.removeprefix("module.") if key.startswith("module.base_model.") else key
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def _is_veralib(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as f:
            return "vera_format" in (f.metadata() or {})
    except (OSError, SafetensorError):  # no file, or a damaged one
        return False


def write_folder(folder: str | Path, adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The folder, with PEFT's two files: the method's config and tensors, and what is the same for VeRA and LoRA.

    Both files are written under temporary names first, so a full disk leaves the old ones. AdapterFileError.
    """
    from safetensors.torch import save_file

    if adapter.magnitudes:
        raise AdapterMismatch(
            "the adapter is DVoRA's, and a folder of PEFT's VeRA or LoRA has no place for its magnitudes: merge it instead "
            "(vera merge)."
        )
    for layer, bias in adapter.biases.items():
        tensors[f"{PREFIX}{layer}.base_layer.bias"] = bias
    for name, state in adapter.modules.items():
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in state.items()}
    # One copy each: safetensors refuses tensors that share memory.
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    noted = {k: json.loads(adapter.notes[f"peft.{k}"]) for k in NOTED if f"peft.{k}" in adapter.notes}
    names = list(adapter.base.layers)
    config = {
        **config,
        "target_modules": names,
        "modules_to_save": list(adapter.modules) or None,
        "base_model_name_or_path": adapter.base.id or None,
        "revision": adapter.base.revision or None,
        # The names of GPT-2's Conv1D. PEFT looks for itself and corrects a wrong value, with a warning.
        "fan_in_fan_out": noted.get("fan_in_fan_out", all(n.endswith(("c_attn", "c_proj", "c_fc")) for n in names)),
        "task_type": noted.get("task_type"),
        "inference_mode": True,
        "auto_mapping": None,
    }
    folder = Path(folder)
    if _is_veralib(folder / WEIGHTS_FILE):
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} is a veralib adapter, which this would overwrite: name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            save_file(tensors, Path(scratch) / WEIGHTS_FILE, metadata={"format": "pt"})
            (Path(scratch) / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(scratch) / name, folder / name)
    except Exception as e:  # safetensors raises a plain Exception of its own for I/O errors
        raise AdapterFileError(f"can't write to {folder}: {e}. Older files in it are as they were.") from e
    return folder
