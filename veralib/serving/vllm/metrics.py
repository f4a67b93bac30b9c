"""What the plugin adds to vLLM's /metrics page. There are no labels: names of adapters are nobody's business."""

from collections.abc import Mapping
from functools import cache
from typing import Any


class Metrics:
    """Counted in the API server; the gauges are what the engine core said last. Names begin with "vera:", as vLLM's with "vllm:".

    In vLLM's registry, so also where several API servers add up theirs on one page; they speak of one engine, whose latest word
    counts.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self.hits = Counter("vera:adapter_hits", "Requests whose adapter was in the engine's memory.")
        self.misses = Counter("vera:adapter_misses", "Adapters read from the store and loaded.")
        self.failures = Counter("vera:adapter_failures", "Adapters that couldn't be read or loaded.")
        latest: Any = {"multiprocess_mode": "mostrecent"}
        self.adapters = Gauge("vera:resident_adapters", "Versions of adapters in the engine's memory.", **latest)
        self.bytes = Gauge("vera:resident_bytes", "Bytes of their vectors in CPU memory, over all workers.", **latest)
        self.bases = Gauge("vera:resident_bases", "Different pairs A, B that they need.", **latest)

    def set(self, report: Mapping[str, Any]) -> None:
        """A report of Residents."""
        self.adapters.set(report["adapters"])
        self.bytes.set(report["bytes"])
        self.bases.set(report["bases"])


@cache
def metrics() -> Metrics:
    """This process's."""
    return Metrics()
