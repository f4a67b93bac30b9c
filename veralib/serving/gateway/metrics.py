"""/metrics: Prometheus counters of the gateway and what the engine says of itself. No label is ever a name, a key or a tenant."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FROM_ENGINE = {
    "vllm:prefix_cache_hits": "vera_engine_prefix_cache_hits",
    "vllm:prefix_cache_queries": "vera_engine_prefix_cache_queries",
    "vllm:num_requests_running": "vera_engine_requests_running",
    "vllm:num_requests_waiting": "vera_engine_requests_waiting",
    "vllm:kv_cache_usage_perc": "vera_engine_kv_cache_usage",
    "vllm:prompt_tokens": "vera_engine_prompt_tokens",
    "vllm:generation_tokens": "vera_engine_generation_tokens",
    "veralib_engine_generated_tokens": "vera_engine_generation_tokens",
    "process_resident_memory_bytes": "vera_engine_resident_memory_bytes",
}
"""Engines' names of what is passed on. All others of vLLM's aren't: vllm:lora_requests_info has adapters' names in its labels."""
OWN = re.compile("(?:veralib_engine_|vera:)(.+)")
"""Names of our own engines' metrics, the embedded one's and the plugin's for vLLM: passed on as vera_engine_…"""
TAKEN = {"vera_engine_up", "vera_engine_restarts"}
"""What the gateway itself says of the engine."""


class Metrics:
    """The gateway's own counters, in a registry of their own: several gateways in one process don't meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("vera_requests", "Requests by route and class of HTTP code.", ["route", "code"], **r)
        self.seconds = Histogram("vera_request_seconds", "Time from request to last byte.", ["route"], buckets=_SECONDS, **r)
        self.first_token = Histogram("vera_time_to_first_token_seconds", "Of streams.", buckets=_SECONDS, **r)
        self.tokens = Counter("vera_tokens", "Tokens read (in) and written (out).", ["direction"], **r)
        self.refused = Counter("vera_refused", "Requests that a limit turned away.", ["limit"], **r)
        self.disconnects = Counter("vera_disconnects", "Clients that left before their answer ended.", **r)
        self.retries = Counter("vera_version_retries", "Further questions as the engine lacked the version that was live.", **r)
        self.running = Gauge("vera_running", "Requests that the engine has.", **r)
        self.waiting = Gauge("vera_waiting", "Requests in the queue.", **r)
        self.engine_up = Gauge("vera_engine_up", "1 where the engine answers.", **r)
        self.restarts = Counter("vera_engine_restarts", "Times that the engine was started again.", **r)

    def text(self, engine: str) -> bytes:
        """The page. engine: the engine's own page, "" where it doesn't answer."""
        registry = CollectorRegistry()
        registry.register(_Families(from_engine(engine)))
        return generate_latest(self.registry) + generate_latest(registry)


def from_engine(text: str) -> list[Metric]:
    """What is passed on of an engine's page: sums over all labels, so that no label comes through."""
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(text):
            name = FROM_ENGINE.get(family.name)
            if name is None and (own := OWN.fullmatch(family.name)):
                name = f"vera_engine_{own[1]}"
            if name is None or name in TAKEN or family.type not in ("counter", "gauge"):
                continue
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    sums[name, family.type, family.documentation] += sample.value
    except ValueError:
        return []  # an engine that died while it wrote
    made: list[Metric] = []
    for (name, kind, about), value in sums.items():
        made.append((CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, about or name, value=value))
    return made


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        yield from self.families
