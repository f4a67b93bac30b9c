"""The worker's side: vLLM's model runner asks this instead of its own LoRA manager. No file or store is read within a step."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ...errors import AdapterMismatch, StateError, StoreError, UnknownName, VeraError, nearest
from ...products import emulated
from ...store import Store, open_store
from ..names import engine_name, parse_engine_name
from .bases import FULL, Bases, NoPlace
from .settings import Settings, check_servable, check_with_lora, settings_of
from .sites import places
from .sums import Site, adapted
from .tables import Layout, Loaded, Tables
from .wire import DATA, STORE, Unit, Vectors, unpack, vectors_of


class Manager:
    """Every adapter of one worker: in CPU memory by number, the ones in use in slots of the tables.

    It has the methods that vLLM's LoRAModelRunnerMixin calls on a LRUCacheWorkerLoRAManager, and is no subclass of it. How many
    adapters stay in CPU memory is decided in the engine core (residents.py), which knows what requests wait for.
    """

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device, embedding_modules: Mapping[str, str] | None = None) -> None:
        settings = settings_of(vllm_config)
        if settings is None:
            raise StateError('a worker with VeRA adapters was asked for without the setting "vera" in --additional-config.')
        check_with_lora(vllm_config)
        self.settings: Settings = settings
        self.device = torch.device(device)
        self.slots: int = vllm_config.lora_config.max_loras
        self.only = vllm_config.lora_config.target_modules
        self.tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        model = vllm_config.model_config
        plain = emulated(torch.empty(0, dtype=model.dtype, device=self.device))
        self.dtype: torch.dtype = torch.float32 if plain else model.dtype
        self.static = not model.enforce_eager
        self.hf_config = model.hf_config
        self.loaded: dict[int, Loaded] = {}
        self.active: OrderedDict[int, int] = OrderedDict()
        """number -> slot, who was used longest ago first."""
        self._layouts: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()
        """As long as an adapter has them."""
        self._store: Store | None = None

    # The model

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """The model, ready for adapters. Its modules stay: each linear's quant method gets an `apply` around its own."""
        from vllm.model_executor.utils import get_packed_modules_mapping

        packed = get_packed_modules_mapping(model)
        found = {n: mp for n, mp in places(model, self.hf_config, packed).items() if self._wanted(n, packed)}
        if not found:
            raise StateError(
                f"{type(model).__name__} has no linear that an adapter could go on, or --lora-target-modules names none."
            )
        self._renamed = getattr(getattr(model, "hf_to_vllm_mapper", None), "get_rename_mapper", lambda: None)()
        r, k = self.settings.max_rank, self.settings.max_bases
        pieces = [p for _, place in found.values() for p in place.pieces]
        self.bases = Bases(k, r, self.dtype, self.device)
        self.tables = Tables(
            self.slots, r, k, r * len(pieces), sum(p.width for p in pieces), self.tokens, self.dtype, self.device, self.static
        )
        self.sites: dict[str, Site] = {}
        self._of_unit: dict[str, list[tuple[Site, int]]] = {}
        first_d = first_b = first = 0
        for name, (module, place) in found.items():
            site = Site(place, self.tables, self.bases, first_d, first_b, first)
            first_d += r * len(place.pieces)
            first_b += sum(p.width for p in place.pieces)
            first += len(place.pieces)
            self.sites[name] = site
            for i, piece in enumerate(place.pieces):
                self._of_unit.setdefault(piece.unit, []).append((site, i))
            method: Any = module.quant_method
            if not hasattr(method.apply, "vera_inner"):
                method.apply = adapted(method.apply)
            module.__dict__["vera_site"] = site
        return model

    def _wanted(self, name: str, packed: Mapping[str, list[str]]) -> bool:
        if self.only is None:
            return True
        last = name.rpartition(".")[2]
        return bool({name, last, *packed.get(last, [])} & set(self.only))

    @property
    def bytes(self) -> dict[str, int]:
        """Device memory: of the tables, and of the bases."""
        return {"tables": self.tables.bytes, "bases": self.bases.bytes}

    # Adapters in CPU memory

    def add_adapter(self, request: Any) -> tuple[int, int] | str:
        """(its place among the bases, its bytes) when the adapter is in CPU memory; why not, in words, otherwise.

        Words and not an exception: one that crosses vLLM's multiprocess executor leaves the answers of the other workers in
        their queues, to be taken for those of the next call.
        """
        number = request.lora_int_id
        if request.load_inplace:
            self.remove_adapter(number)
        try:
            if number not in self.loaded:
                self.loaded[number] = self._load(number, self._read(request), request.lora_name)
        except NoPlace:
            return FULL
        except (VeraError, OSError) as e:
            return str(e)
        except Exception as e:  # a worker that dies takes everybody's requests along
            return f'adapter "{request.lora_name}" can\'t be loaded: {type(e).__name__}: {e}.'
        return self.loaded[number].basis, self.loaded[number].bytes

    def _read(self, request: Any) -> Vectors:
        path, name = request.lora_path, request.lora_name
        if path.startswith(DATA):
            return unpack(path)
        if not path.startswith(STORE):
            raise StoreError(
                f'adapter "{name}" has the path "{path[:200]}": this server takes VeRA adapters from its store by name. LoRA '
                'adapters need a server without the setting "vera".'
            )
        return read(self._opened(), path.removeprefix(STORE), self.settings)

    def _opened(self) -> Store:
        if self._store is None:
            self._store = open_store(self.settings.store)
        return self._store

    def _load(self, number: int, vectors: Vectors, name: str) -> Loaded:
        units = [(unit, self._places_of(unit, name)) for unit in vectors.units]
        layout = self._layout(units)
        at = self.bases.place(vectors.basis)
        factor = 1 / self.bases.factor(vectors.basis)
        d = torch.cat([unit.d * factor for unit, found in units for _ in found])
        b = torch.cat(
            [unit.b[p.start : p.start + p.width] for unit, found in units for p in (s.place.pieces[i] for s, i in found)]
        )
        d, b = d.to(self.dtype), b.to(self.dtype)
        if self.device.type != "cpu":
            d, b = d.pin_memory(), b.pin_memory()
        return Loaded(number, layout, at, d, b)

    def _places_of(self, unit: Unit, name: str) -> list[tuple[Site, int]]:
        known = next((k for k in self._names(unit.name) if k in self._of_unit), None)
        if known is None:
            raise AdapterMismatch(
                f'adapter "{name}" adapts "{unit.name}", where this server\'s model has no linear that can take an adapter.'
                f"{nearest(unit.name, self._of_unit)} Serve the model it was trained on."
            )
        found = self._of_unit[known]
        site = found[0][0]
        outputs = site.place.outputs[known]
        if len(unit.b) != outputs or (unit.inputs and unit.inputs != site.place.inputs):
            raise AdapterMismatch(
                f'adapter "{name}" has {len(unit.b)} outputs and {unit.inputs} inputs at "{unit.name}"; this server\'s model has '
                f"{outputs} and {site.place.inputs} there. Serve the model it was trained on."
            )
        if len(unit.d) > self.settings.max_rank:
            raise AdapterMismatch(
                f'adapter "{name}" has rank {len(unit.d)} at "{unit.name}", and this server takes up to '
                f'{self.settings.max_rank}: start it with a larger "max_rank" in the setting "vera".'
            )
        if not site.called and not self.static and self._ran:
            raise AdapterMismatch(
                f'adapter "{name}" adapts "{unit.name}", a linear that this model never calls in vLLM (its weight is used in '
                "another way), so the adapter would do nothing there. Merge it."
            )
        return found

    @property
    def _ran(self) -> bool:
        return any(site.called for site in self.sites.values())

    def _names(self, unit: str) -> Iterator[str]:
        layer, colon, part = unit.partition(":")
        yield unit
        if self._renamed is not None and (other := self._renamed._map_name(layer + ".weight")):
            yield other.removesuffix(".weight") + colon + part
        yield "model." + unit  # saved from the bare encoder or decoder, served as a whole model

    def _layout(self, units: Iterable[tuple[Unit, list[tuple[Site, int]]]]) -> Layout:
        key = tuple((unit.name, len(unit.d)) for unit, _ in units)
        layout = self._layouts.get(key)
        if layout is None:
            columns_d, columns_b, pieces = [], [], []
            for unit, found in units:
                for site, i in found:
                    start = site.columns_d[i].start
                    columns_d.append(torch.arange(start, start + len(unit.d)))
                    columns_b.append(torch.arange(site.columns_b[i].start, site.columns_b[i].stop))
                    pieces.append(site.numbers[i])
            layout = self._layouts[key] = Layout(
                torch.cat(columns_d).to(self.device),
                torch.cat(columns_b).to(self.device),
                frozenset(pieces),
                max(r for _, r in key),
            )
        return layout

    def remove_adapter(self, number: int) -> bool:
        """Forgets an adapter; whether it was there."""
        adapter = self.loaded.pop(number, None)
        if adapter is None:
            return False
        if number in self.active:
            self.tables.clear(self.active.pop(number))
        self.bases.leave(adapter.basis)
        return True

    def remove_all_adapters(self) -> None:
        """Forgets all."""
        for number in list(self.loaded):
            self.remove_adapter(number)

    def list_adapters(self) -> set[int]:
        """The numbers of those in CPU memory."""
        return set(self.loaded)

    def pin_adapter(self, number: int) -> bool:
        """Refused: what stays is decided in the engine core."""
        raise StateError("VeRA adapters can't be pinned: those that a request waits for stay in memory by themselves.")

    # The step

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any | None) -> None:
        """Before a forward: the adapters of its requests in slots, and which slot each token uses."""
        wanted = {r.lora_int_id for r in requests if r}
        if mapping is not None:
            # LoRARequests are equal by name: of a version that was unloaded while it answered and then loaded again, the set
            # keeps only one of two numbers. The tokens carry both.
            wanted |= {int(number) for number in set(mapping.index_mapping) if number > 0}
        if len(wanted) > self.slots:
            raise RuntimeError(f"a step has {len(wanted)} adapters, and there are {self.slots} slots (--max-loras)")
        for number in wanted:
            if number in self.active:
                self.active.move_to_end(number)
        for number in wanted:
            if number not in self.active:
                self._activate(number)
        if mapping is not None:
            self.tables.follow(mapping.index_mapping, self.active)

    def _activate(self, number: int) -> None:
        if len(self.active) < self.slots:
            taken = set(self.active.values())
            slot = next(s for s in range(self.slots) if s not in taken)
        else:
            slot = self.active.popitem(last=False)[1]
        self.tables.write(slot, self.loaded[number])
        self.active[number] = slot

    # vLLM's warm-up

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing to keep: a dummy adapter is a few zeros."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An adapter of zeros on every layer, so that a warm-up or a capture does all that a step can have to do."""
        if request.lora_int_id in self.loaded:
            return False
        t = self.tables
        layout = self._layouts.get(("dummy",))
        if layout is None:
            every = lambda n: torch.arange(n, device=self.device)  # noqa: E731
            pieces = frozenset(n for site in self.sites.values() for n in site.numbers)
            layout = self._layouts["dummy",] = Layout(every(t.width_d), every(t.width_b), pieces, t.rank)
            self._zeros = torch.zeros(t.width_d, dtype=t.dtype), torch.zeros(t.width_b, dtype=t.dtype)
        self.bases.users[0] += 1
        self.loaded[request.lora_int_id] = Loaded(request.lora_int_id, layout, 0, *self._zeros)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Any will do."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Adapters go on the language model alone."""
        return False


def read(store: Store, name: str, settings: Settings) -> Vectors:
    """The adapter of an engine's name, if that version is still the current one. UnknownName, StoreError, AdapterMismatch."""
    plain, version, _ = parse_engine_name(name)
    adapter = store.get(plain, version)
    if engine_name(store, plain) != name:
        raise UnknownName(f'version "{name}" is no longer the current one of adapter "{plain}": ask again.')
    check_servable(adapter, plain, settings)
    return vectors_of(adapter)
