"""PEFT's VeRA config and tensors, as data, turned into an Adapter; and the shapes filled in that PEFT's files leave out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, BaseModel
from ..basis import Basis, StoredPair, peft_pair
from ..config import VeraConfig
from ..errors import AdapterFileError, AdapterMismatch, ConfigError, unknown_text
from .folder import CONFIG_FILE, NOTED, check_method, plain_key


def adapter_from_peft(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """The Adapter that PEFT's config (adapter_config.json as a mapping) and tensors (its file's keys) say.

    where: named in errors.
    """
    check_method(fields, where)
    vectors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    pair: dict[str, Tensor] = {}
    for raw, tensor in tensors.items():
        key = plain_key(raw)
        layer, _, last = key.rpartition(".")
        if last in ("vera_A", "vera_B"):
            pair[last[-1]] = tensor.detach().to("cpu", torch.float32)
        elif last in ("vera_lambda_d", "vera_lambda_b"):
            vectors.setdefault(layer, {})[last[-1]] = tensor.detach().to("cpu", torch.float32).contiguous()
        else:
            rest[key] = tensor.detach().cpu().contiguous()
    rank = _checked_rank(vectors, fields.get("r"), where)
    seed = fields.get("projection_prng_key")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise AdapterFileError(
            f"{where}: projection_prng_key is {seed!r}, expected a whole number from 0 to 2**63 - 1, from which A and B grow."
        )
    layers = {layer: (v["b"].numel(), 0) for layer, v in vectors.items()}
    biases, modules = _split_rest(rest, set(layers), fields, where)
    basis = _basis(seed, rank, pair, max(m for m, _ in layers.values()), where)
    try:
        config = translate(fields, targets=tuple(layers) if fields.get("layers_pattern") else None, modules=tuple(modules))
    except ConfigError as e:
        raise AdapterFileError(f"{where}: {CONFIG_FILE} can't be used: {e}") from e
    return Adapter(
        config=config,
        basis=basis,
        base=BaseModel(id=fields.get("base_model_name_or_path") or "", revision=fields.get("revision") or "", layers=layers),
        vectors={layer: (v["d"], v["b"]) for layer, v in vectors.items()},
        biases=biases,
        modules=modules,
        notes={f"peft.{k}": json.dumps(fields[k]) for k in NOTED if fields.get(k)},
    )


def with_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter with each layer's inputs and the pair's largest input filled in where a PEFT folder didn't say them.

    shapes: module name -> (m, n) of the base model, of the adapter's layers at least. AdapterMismatch where a layer is
    missing, has other outputs, or more inputs than the stored pair.
    """
    faults = []
    layers = {}
    for layer, (m, n) in adapter.base.layers.items():
        if layer not in shapes:
            faults.append(unknown_text("linear", layer, shapes))
            continue
        m_model, n_model = shapes[layer]
        if m_model != m:
            faults.append(f'"{layer}" has {m} outputs in the adapter, {m_model} in the model')
        elif n not in (0, n_model):
            faults.append(f'"{layer}" has {n} inputs in the adapter, {n_model} in the model')
        layers[layer] = (m_model, n_model)
    basis = adapter.basis
    widest = max((n for _, n in layers.values()), default=0)
    if basis.kind == "peft" and not faults:
        if basis.max_in == 0:
            basis = replace(basis, max_in=widest)
        elif widest > basis.max_in:
            faults.append(f"a layer has {widest} inputs, PEFT's A has {basis.max_in} columns")
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise AdapterMismatch(
            f"this PEFT adapter is for another base model: {shown}. Load the model it was trained on"
            f"{f': {adapter.base.id}' if adapter.base.id else ''}."
        )
    return replace(adapter, base=replace(adapter.base, layers=layers), basis=basis)


def require_shapes(adapter: Adapter, what: str) -> None:
    """AdapterMismatch unless every layer's inputs are known, which `what` needs."""
    unknown = [layer for layer, (_, n) in adapter.base.layers.items() if n <= 0]
    if unknown:
        raise AdapterMismatch(
            f"{what} needs to know how many inputs \"{unknown[0]}\" has, and PEFT's files don't say. Read the adapter with "
            "its base model: read_peft(folder, model=model), or vera.load(folder) and vera.adapter(name)."
        )


def _checked_rank(vectors: Mapping[str, Mapping[str, Tensor]], rank: Any, where: str) -> int:
    """The rank, once every layer's vectors have been found whole, of the right length and finite."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise AdapterFileError(f"{where}: r is {rank!r} in {CONFIG_FILE}, expected a whole number above 0.")
    if not vectors:
        raise AdapterFileError(f"{where} holds no vera_lambda_d and vera_lambda_b: no layer is adapted.")
    for layer, pair in vectors.items():
        if missing := {"d", "b"} - set(pair):
            raise AdapterFileError(f'{where}: layer "{layer}" lacks its vera_lambda_{missing.pop()}: the file is incomplete.')
        d, b = pair["d"], pair["b"]
        if d.shape != (rank,) or b.dim() != 1 or not b.numel():
            raise AdapterFileError(
                f'{where}: layer "{layer}" has vera_lambda_d {tuple(d.shape)} and vera_lambda_b {tuple(b.shape)}, expected '
                f"({rank},), the r of {CONFIG_FILE}, and one number an output."
            )
        if not (d.isfinite().all() and b.isfinite().all()):
            raise AdapterFileError(f'{where}: layer "{layer}" has NaN or infinite entries: its training diverged. Train again.')
    return rank


def _basis(seed: int, rank: int, pair: Mapping[str, Tensor], max_out: int, where: str) -> Basis:
    """The basis of saved projections, of the seed alone where they are what grows from it; max_in 0 where it isn't known."""
    if not pair:
        return Basis("peft", seed, rank=rank, max_in=0, max_out=max_out)
    if len(pair) == 1:
        raise AdapterFileError(f"{where} holds vera_{next(iter(pair))} alone: A and B are saved both or neither.")
    A, B = pair["A"], pair["B"]
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank or B.shape[0] < max_out:
        raise AdapterFileError(
            f"{where}: vera_A has shape {tuple(A.shape)} and vera_B {tuple(B.shape)}, expected ({rank}, widest input) and "
            f"({max_out} or more, {rank})."
        )
    basis = Basis("peft", seed, rank=rank, max_in=A.shape[1], max_out=B.shape[0])
    grown = peft_pair(basis)
    return basis if torch.equal(grown[0], A) and torch.equal(grown[1], B) else replace(basis, stored=StoredPair(A, B))


def _split_rest(
    rest: Mapping[str, Tensor], layers: set[str], fields: Mapping[str, Any], where: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(biases by layer, fully trained modules by name) of the tensors that aren't VeRA's own."""
    biases: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in rest.items():
        layer = key.removesuffix(".bias").removesuffix(".base_layer")
        if key.endswith(".bias") and layer in layers:
            biases[layer] = tensor
        elif (module := _saved_module(key, fields.get("modules_to_save") or ())) is not None:
            modules.setdefault(module, {})[key[len(module) + 1 :]] = tensor
        elif tensor.dim() == 2 and key.endswith(".weight"):  # PEFT adds the embeddings where the vocabulary has grown
            modules.setdefault(key.removesuffix(".weight"), {})["weight"] = tensor
        else:
            unknown.append(key)
    if unknown:
        named = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        if fields.get("bias") == "all":
            raise AdapterFileError(
                f"{where} was trained with bias='all': biases outside the adapted layers changed too, and veralib has no place "
                f"for them: {named}. Merge it with PEFT (merge_and_unload) and use the result as a base model of its own."
            )
        raise AdapterFileError(f"{where} holds tensors that are no part of PEFT's VeRA: {named}.")
    return biases, modules


def _saved_module(key: str, names: Any) -> str | None:
    """The fully trained module that a tensor belongs to: the outermost one whose name ends as PEFT was told."""
    parts = key.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in paths if any(path.endswith(name) for name in names)), None)


def translate(fields: Mapping[str, Any], targets: Any, modules: tuple[str, ...]) -> VeraConfig:
    """PEFT's settings in our words; `targets` instead of PEFT's target_modules where given."""
    if targets is None:
        targets = fields.get("target_modules")
        targets = targets if isinstance(targets, str) or targets is None else tuple(sorted(targets))
        layers = fields.get("layers_to_transform")
        layers = (layers,) if isinstance(layers, int) else (tuple(layers) if layers else None)
    else:
        layers = None
    return VeraConfig(
        rank=fields["r"],
        seed=fields["projection_prng_key"],
        targets=targets,
        layers=layers,
        d_initial=fields.get("d_initial", 0.1),
        basis="peft",
        dropout=fields.get("vera_dropout", 0.0),
        train_modules=modules,
    )
