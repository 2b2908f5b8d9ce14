"""The Prometheus endpoint of a run: loopback, a registry of its own. The names are a contract (docs/reference/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, start_http_server

from orchestrator.telemetry.goodput import BUCKETS, Ledger
from orchestrator.telemetry.records import Event, StepReport

STATES = ("starting", "running", "recovering", "succeeded", "failed", "cancelled")
NOT_BYTES = ("pipeline_rank", "peak_phase", "tensor_peak_bytes", "peak_bytes")
"""Fields of a stage in a plan's JSON that are no component."""
STEP_SECONDS = tuple(round(mantissa * 10.0**power, 3) for power in range(-2, 3) for mantissa in (1, 1.5, 2, 3, 5, 7))
CHECKPOINT_SECONDS = tuple(round(mantissa * 10.0**power, 3) for power in range(-2, 4) for mantissa in (1, 2, 5))


class Registry(CollectorRegistry):
    """Without the `_created` series that the client adds to every counter and histogram: twice as many lines, for nobody."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class Metrics:
    """A watcher of the run that keeps its metrics and serves them."""

    def __init__(self, plan: Mapping[str, Any], *, num_gpus: int, ledger: Ledger | None = None) -> None:
        self.registry = registry = Registry()
        self.num_gpus, self.ledger = num_gpus, ledger or Ledger()
        self._server: Any = None
        self._last_tokens: int | None = None

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"shardwise_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"shardwise_{name}", text, labels, registry=registry)

        self.run = Info("shardwise_run", "Which run this is; 1.", registry=registry)
        self.tokens_per_second = gauge("tokens_per_second", "Tokens per second of the last step, all GPUs.")
        self.per_gpu = gauge("tokens_per_second_per_gpu", "Tokens per second and GPU of the last step.")
        self.target = gauge("target_tokens_per_second_per_gpu", "What the job wants; NaN where it wants nothing.")
        self.predicted = gauge("predicted_tokens_per_second_per_gpu", "What the plan promised.")
        self.mfu = gauge("mfu_ratio", "Model FLOPs of the last step over the peak of the GPUs; NaN where unknown.")
        self.step_seconds = Histogram(
            "shardwise_step_seconds", "Seconds of a step.", buckets=STEP_SECONDS, registry=registry
        )
        self.loss = gauge("loss", "Training loss of the last step, nats per token.")
        self.validation_loss = gauge("validation_loss", "Loss on held-out text, nats per token; NaN before the first.")
        self.learning_rate = gauge("learning_rate", "Learning rate of the last step.")
        self.gradient_norm = gauge("gradient_norm", "Global gradient norm of the last step, before clipping.")
        self.tokens = counter("tokens", "Tokens read since this process began, steps done again included.")
        self.steps = counter("steps", "Steps done since this process began, steps done again included.")
        self.step = gauge("step", "Last step that was done.")
        self.last_step = gauge("last_step_timestamp_seconds", "When the last step ended, Unix time.")
        self.memory = gauge("memory_bytes", "Live tensor bytes at the measured peak, fullest rank.", ("component",))
        self.predicted_memory = gauge(
            "predicted_memory_bytes", "Bytes at the peak by the plan, fullest rank.", ("component",)
        )
        self.data_wait = counter("data_wait_seconds", "Seconds that the loop waited for data.")
        self.checkpoint_seconds = Histogram(
            "shardwise_checkpoint_seconds",
            "Seconds from the call to the renamed checkpoint.",
            buckets=CHECKPOINT_SECONDS,
            registry=registry,
        )
        self.recoveries = counter("recoveries", "Restarts, by what failed.", ("cause",))
        self.gpu_seconds = counter("gpu_seconds", "Where GPU time went; sums to wall time x GPUs.", ("bucket",))
        self.jobs = gauge("jobs", "Jobs of this process by state.", ("state",))
        for bucket in BUCKETS:
            self.gpu_seconds.labels(bucket).inc(0)
        self._state("starting")
        self._promise(plan)

    def _promise(self, plan: Mapping[str, Any]) -> None:
        self.run.info(
            {
                "name": str(plan["job"]["name"]),
                "model": str(plan["model"]["name"]),
                "accelerator": str(plan["cluster"]["gpu"]),
                "accelerators": str(self.num_gpus),
            }
        )
        for unknown in (self.target, self.mfu, self.loss, self.validation_loss):
            unknown.set(float("nan"))
        if plan.get("wanted"):
            self.target.set(float(plan["wanted"]))
        self.predicted.set(float(plan["throughput"]["tokens_per_second_per_gpu"]))
        fullest = max(plan["memory"]["stages"], key=lambda stage: int(stage["peak_bytes"]))
        for component, num_bytes in fullest.items():
            if component not in NOT_BYTES:
                self.predicted_memory.labels(component).set(num_bytes)

    def serve(self, port: int) -> str:
        """Opens the endpoint on loopback; its address. Port 0 picks a free one."""
        self._server, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        return f"http://127.0.0.1:{self._server.server_port}/metrics"

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def on_step(self, report: StepReport) -> None:
        self._state("running")
        self.tokens_per_second.set(report.tokens_per_second)
        self.per_gpu.set(report.tokens_per_second_per_gpu)
        self.mfu.set(float("nan") if report.mfu is None else report.mfu)
        self.step_seconds.observe(report.step_s)
        self.loss.set(report.loss)
        self.learning_rate.set(report.learning_rate)
        self.gradient_norm.set(report.gradient_norm)
        self.tokens.inc(report.tokens_per_second * report.step_s)
        self.steps.inc()
        self.step.set(report.step)
        self.last_step.set(report.time_unix_s)
        self.data_wait.inc(report.data_wait_s)
        self._account(self.ledger.step(report))

    def on_event(self, event: Event) -> None:
        details = event.details
        match event.kind:
            case "memory" | "memory_measured":
                for component, num_bytes in details.get("components", {}).items():
                    self.memory.labels(component).set(num_bytes)
            case "checkpoint":
                self.checkpoint_seconds.observe(float(details.get("seconds", 0.0)))
            case "evaluation":
                self.validation_loss.set(float(details["loss"]))
            case "restart":
                self.recoveries.labels(str(details["failure"])).inc()
                self._state("recovering")
            case "finished":
                self._state("succeeded")
            case "failed" | "lost":
                self._state("failed")
            case "stopped":
                self._state("cancelled")
        self._account(self.ledger.event(event))

    def _account(self, seconds: Mapping[str, float]) -> None:
        for bucket, spent_s in seconds.items():
            self.gpu_seconds.labels(bucket).inc(spent_s * self.num_gpus)

    def _state(self, state: str) -> None:
        for known in STATES:
            self.jobs.labels(known).set(float(known == state))
