"""What Prometheus is told."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ._engine import Engine

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_PREFIX = "lora_jax_"


class Metrics:
    """Counts of one server, and what its engine does at the moment of asking."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Choices that ended, by model and why.", "ending")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, by model.")
        self.new_tokens = self._counter("generation_tokens", "Tokens written, by model.")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a call's arrival to its first token.", _WAITS
        )
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "Between a text's tokens, by text.", _GAPS
        )
        self.latency = self._histogram(
            "request_seconds", "From a call's arrival to its end.", _WAITS
        )
        self.responses = Counter(
            f"{_PREFIX}http_responses", "Answers by status.", ["code"], registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, ["model", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        own = dict(registry=self.registry, buckets=buckets)
        return Histogram(_PREFIX + name, text, ["model"], **own)  # type: ignore[arg-type]


class _OfEngine:
    """An engine's own counts, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        gauges = {
            "requests_running": ("Requests that have a row.", stats.running),
            "requests_waiting": ("Requests that wait for a row.", stats.waiting),
            "rows": ("Requests that can run at one time.", self._engine.max_rows),
            "adapters": ("Adapters that can be asked for.", len(self._engine.adapters)),
            "adapters_on_device": ("Adapters that are in a slot.", stats.on_device),
            "compilations": ("Programs, all made at the start.", self._engine.compilations),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
        counters = {
            "engine_prompt_tokens": ("Tokens of prompts that were read.", stats.prompt_tokens),
            "engine_reused_tokens": ("Those known from another request.", stats.reused_tokens),
            "engine_generation_tokens": ("Tokens that were chosen.", stats.new_tokens),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=value)
