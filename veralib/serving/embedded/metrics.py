"""What /metrics says. Labels have few values: no model's and no tenant's name is one."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one served engine."""

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        said: Any = {"registry": self.registry}
        self.requests = Counter("veralib_engine_requests", "Answered requests.", ["route", "status"], **said)
        self.prompt_tokens = Counter("veralib_engine_prompt_tokens", "Tokens of prompts and texts.", **said)
        self.generated_tokens = Counter("veralib_engine_generated_tokens", "Tokens generated and sent.", **said)
        self.cancelled = Counter("veralib_engine_cancelled", "Requests whose client left before the end.", **said)
        self.seconds = Histogram(
            "veralib_engine_request_seconds", "From request to the answer's end.", ["route"], buckets=SECONDS, **said
        )
        self.first = Histogram("veralib_engine_first_token_seconds", "From request to the first token.", buckets=SECONDS, **said)
        up = Gauge("veralib_engine_up", "1 while the model's thread runs.", **said)
        up.set_function(lambda: float(engine.alive))
        self.registry.register(_Residents(engine))  # type: ignore[arg-type]

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Residents:
    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def collect(self) -> Any:
        s = self.engine.residents.statistics
        yield GaugeMetricFamily("veralib_engine_running", "Requests that run or wait.", value=self.engine.load)
        yield GaugeMetricFamily("veralib_engine_resident_adapters", "Adapters in memory.", value=s.adapters)
        yield GaugeMetricFamily("veralib_engine_resident_bytes", "Bytes of their tensors.", value=s.bytes)
        yield GaugeMetricFamily("veralib_engine_resident_bases", "Different pairs A, B in use.", value=s.bases)
        yield CounterMetricFamily("veralib_engine_adapter_hits", "Requests whose adapter was in memory.", value=s.hits)
        yield CounterMetricFamily("veralib_engine_adapter_misses", "Requests whose adapter was read.", value=s.misses)
        yield CounterMetricFamily("veralib_engine_adapter_evictions", "Adapters that made room.", value=s.evictions)
        yield CounterMetricFamily("veralib_engine_adapter_failures", "Adapters that couldn't be read or used.", value=s.failures)
        yield CounterMetricFamily("veralib_engine_steps", "Forwards of the model.", value=steps_of(self.engine))


def steps_of(engine: Any) -> int:
    """How many forwards the engine has run."""
    return engine.loop.steps if hasattr(engine, "loop") else engine.steps
