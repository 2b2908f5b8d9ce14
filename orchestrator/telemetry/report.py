"""report.html: one page of a run, self-contained, from nothing but its folder (plan.json, metrics.jsonl, events.jsonl)."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clusters.files import write_atomically
from orchestrator.planner.show.words import TIMES
from orchestrator.telemetry.goodput import ENDS, Ledger
from orchestrator.telemetry.history import History, Steps
from orchestrator.telemetry.records import Event

POINTS = 1200
"""Points of a curve at most: as many as a wide screen can show."""
SHOWN_EVENTS = 300
WARM_UP_STEPS = 3
"""Steps after a start that are left out of medians: allocations, and the step that is measured."""
NOT_BYTES = ("pipeline_rank", "peak_phase", "tensor_peak_bytes", "peak_bytes")
OF_TIME = tuple(part.name for part in TIMES)
"""Parts of a plan's step; they sum to step_s."""
PHASES = (
    "plan_s",
    "prepare_s",
    "ray_s",
    "placement_s",
    "workers_s",
    "worker_join_s",
    "worker_data_s",
    "worker_build_s",
)
HIDDEN = ("metrics_endpoint",)


def write(folder: Path) -> Path:
    """Writes the folder's report.html anew."""
    history = History(folder)
    history.update()
    return write_of(history)


def write_of(history: History) -> Path:
    """The same from a history that was read already, as far as it was."""
    target = history.folder / "report.html"
    write_atomically(target, page(data_of(history)))
    return target


def page(data: Mapping[str, Any]) -> str:
    template = files("orchestrator.telemetry").joinpath("report.html").read_text(encoding="utf-8")
    inline = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__TITLE__", html.escape(str(data["name"]))).replace("__DATA__", inline)


def data_of(history: History) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    folder, events, ledger = history.folder, history.events, history.ledger
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    steps = history.steps().last_of_each()
    calm = settled(steps, events)
    state, cause = state_of(events)
    predicted = float(plan["throughput"]["tokens_per_second_per_gpu"])
    speed = median(calm["tokens_per_second_per_gpu"])
    memory = memory_of(plan, events, steps)
    restarts = [{"step": event.step, "cause": event.cause} for event in events if event.kind == "restart"]
    validation = [[event.step, event.details["loss"]] for event in events if event.kind == "evaluation"]
    validation = [list(pair) for pair in dict(validation).items()]
    return {
        "name": plan["job"]["name"],
        "state": state,
        "lead": lead(plan, steps, state, cause, speed, predicted, len(restarts)),
        "tiles": tiles(plan, steps, validation, speed, predicted, memory, ledger),
        "series": series(steps),
        "unit": unit_of(plan),
        "validation": [[step, finite(loss)] for step, loss in validation],
        "restarts": restarts,
        "predicted_speed": predicted,
        "target_speed": plan.get("wanted"),
        "speed_hint": speed_hint(plan, speed, predicted),
        "memory": memory,
        "time": time_of(plan, calm),
        **start_of(events),
        "ledger": {
            "parts": list(ledger.totals.items()),
            "total_s": sum(ledger.totals.values()) or 1.0,
            "hint": f"{told_s(sum(ledger.totals.values()))} of wall time, from the command to its end, on "
            f"{plan['strategy']['num_gpus']} {unit_of(plan)}s; restarts included.",
        },
        "plan": plan_rows(plan),
        "plan_hint": f"{plan['confidence']['source']}",
        "events": [told_event(event) for event in events if event.kind not in HIDDEN][-SHOWN_EVENTS:][::-1],
        "events_hint": "Newest first, times in UTC. All of them are in events.jsonl.",
        "footer": f"Written {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())} from {folder.name}/plan.json, "
        "metrics.jsonl and events.jsonl.",
    }


# Parts ---------------------------------------------------------------------------------------------------------------


def state_of(events: Sequence[Event]) -> tuple[str, str]:
    """finished, stopped, failed, lost, or running (which a killed run looks like, too)."""
    for event in reversed(events):
        if event.kind in ENDS:
            return event.kind, event.cause
        if event.kind == "run":
            break
    return "running", ""


def unit_of(plan: Mapping[str, Any]) -> str:
    """Return what a worker trains on, as a person calls it: on a machine without GPUs, the worker itself."""
    return "worker" if plan["cluster"].get("gpu") == "cpu" else "GPU"


def settled(steps: Steps, events: Sequence[Event]) -> Steps:
    """Reports without the first steps after each start, if others are left."""
    starts = [event.step or 0 for event in events if event.kind == "worker_started"] or [0]
    step = steps["step"]
    calm = steps["skipped"] == 0
    for start in starts:
        calm &= (step <= start) | (step > start + WARM_UP_STEPS)
    kept = steps.where(calm)
    return kept if len(kept) else steps


def lead(
    plan: Mapping[str, Any],
    steps: Steps,
    state: str,
    cause: str,
    speed: float | None,
    predicted: float,
    num_restarts: int,
) -> str:
    """The run in a sentence or three."""
    model, job, strategy = plan["model"], plan["job"], plan["strategy"]
    text = f"{model['name']}, {model['num_parameters']:,} parameters, on {strategy['num_gpus']} of {plan['cluster']['name']}."
    if len(steps):
        text += f" {steps['step'][-1]:,.0f} of {job['steps']:,} steps, {steps['tokens'][-1]:,.0f} tokens."
    if speed:
        text += f" It ran at {speed / predicted:.0%} of the speed that the plan promised."
    if num_restarts:
        text += f" It was restarted {num_restarts} time{'s' if num_restarts > 1 else ''}; no step was lost."
    if state in ("failed", "lost", "stopped") and cause:
        text += f" {state.capitalize()}: {cause}."
    return text


def tiles(
    plan: Mapping[str, Any],
    steps: Steps,
    validation: Sequence[Sequence[float]],
    speed: float | None,
    predicted: float,
    memory: Mapping[str, Any],
    ledger: Ledger,
) -> list[dict[str, str]]:
    total_s = sum(ledger.totals.values())
    useful = ledger.totals["training"] / total_s if total_s else 0.0
    loss = mean(steps["loss"][-max(1, len(steps) // 40) :])
    held_out = f"held-out {validation[-1][1]:.4f}" if validation else "no held-out text yet"
    measured = memory["measured_peak"]
    mfu = median(steps["mfu"])
    return [
        {
            "label": "Loss",
            "value": "–" if loss is None else f"{loss:.4f}",
            "note": held_out if len(steps) else "no step yet",
        },
        {
            "label": f"Tokens/s/{unit_of(plan)}",
            "value": f"{speed:,.0f}" if speed else "–",
            "note": f"plan {predicted:,.0f}" + ("" if mfu is None else f", MFU {mfu:.0%}"),
        },
        {
            "label": "Peak of live tensors",
            "value": told_bytes(measured) if measured else "–",
            "note": f"plan {told_bytes(memory['predicted_peak'])}",
        },
        {"label": "Time on new steps", "value": f"{useful:.0%}", "note": f"of {told_s(total_s)}"},
    ]


def series(steps: Steps) -> dict[str, list[float | None]]:
    """The curves, thinned to what a screen shows: each point is the mean of its neighbours."""
    span = -(-len(steps) // POINTS) or 1
    starts = np.arange(0, len(steps), span)
    ends = np.minimum(starts + span, len(steps)) - 1

    def means(name: str) -> list[float | None]:
        values = steps[name]
        known = np.isfinite(values)
        if not len(values):
            return []
        total = np.add.reduceat(np.where(known, values, 0.0), starts)
        count = np.add.reduceat(known.astype(np.float64), starts)
        return [float(each / n) if n else None for each, n in zip(total, count, strict=True)]

    return {
        "step": [int(step) for step in steps["step"][ends]],
        "loss": means("loss"),
        "speed": means("tokens_per_second_per_gpu"),
        "learning_rate": means("learning_rate"),
        "gradient_norm": means("gradient_norm"),
    }


def memory_of(plan: Mapping[str, Any], events: Sequence[Event], steps: Steps) -> dict[str, Any]:
    """Live tensors by component: the plan's fullest stage beside the fullest rank of the last measurement."""
    stage = max(plan["memory"]["stages"], key=lambda stage: int(stage["peak_bytes"]))
    measurements = [event for event in events if event.kind in ("memory", "memory_measured")]
    measured = measurements[-1].details if measurements else None
    promised = {name: int(value) for name, value in stage.items() if name not in NOT_BYTES}
    reserve = promised.pop("reserve", 0)
    got = {} if measured is None else {name: int(value) for name, value in measured["components"].items()}
    names = [name for name in [*promised, *(got.keys() - promised.keys())] if promised.get(name) or got.get(name)]
    rows = [
        {"name": name, "predicted": promised.get(name, 0), "measured": None if measured is None else got.get(name, 0)}
        for name in names
    ]
    peak = None if measured is None else int(measured["peak_bytes"])
    rows.append({"name": "all tensors", "predicted": int(stage["tensor_peak_bytes"]), "measured": peak})
    hint = f"Fullest {unit_of(plan)} at its peak ({stage['peak_phase']}), measured / plan."
    if peak is not None and stage["tensor_peak_bytes"]:
        hint += f" All tensors: {peak / stage['tensor_peak_bytes'] - 1:+.1%} against the plan."
    if len(steps):
        whole = float(steps["peak_bytes"].max())
        hint += f" The process reached {told_bytes(whole)}; the plan adds {told_bytes(reserve)} for what is no tensor."
    return {"rows": rows, "hint": hint, "measured_peak": peak, "predicted_peak": int(stage["tensor_peak_bytes"])}


def time_of(plan: Mapping[str, Any], steps: Steps) -> dict[str, Any]:
    """Parts of the promised step beside what the loop's own clocks saw."""
    promised = [(name, float(plan["time"].get(name) or 0.0)) for name in OF_TIME]
    step_s = median(steps["step_s"])
    measured = None
    hint = f"The plan: {told_s(plan['time']['step_s'])}."
    if step_s is not None:
        engine = median(steps["engine_s"]) or 0.0
        wait = median(steps["data_wait_s"]) or 0.0
        rest = max(0.0, step_s - engine - wait)
        measured = [("engine_s", engine), ("data_wait_s", wait), ("other_s", rest)]
        hint += f" Measured: {told_s(step_s)}, the median step; {(wait + rest) / step_s:.1%} outside the engine."
    return {
        "predicted": promised,
        "predicted_s": float(plan["time"]["step_s"]),
        "measured": measured,
        "measured_s": step_s,
        "hint": hint,
    }


def start_of(events: Sequence[Event]) -> dict[str, Any]:
    """Seconds from the last command to its first step, by phase."""
    started = [event for event in events if event.kind == "started"]
    if not started:
        return {"start": [], "start_hint": ""}
    details = started[-1].details
    rows = [(name, float(details[name])) for name in PHASES if name in details]
    rows.append(("first_step_s", float(details.get("step_s", 0.0))))
    told = f"{told_s(float(details['first_step_s']))} from the command to its end; phases overlap."
    return {"start": rows, "start_hint": told}


def plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    strategy, memory, job = plan["strategy"], plan["memory"], plan["job"]
    degrees = " x ".join(f"{name} {strategy[f'{name}_parallel_degree']}" for name in ("data", "tensor", "pipeline"))
    offload = [f"{what} to {where}" for what, where in strategy["offload"].items() if where in ("host", "nvme")]
    error = plan["confidence"]
    rows = [
        ("engine", strategy["engine"]),
        ("degrees", degrees),
        ("ZeRO", f"stage {strategy['zero_stage']}, states {strategy['states'].replace('_', ' ')}"),
        (
            "micro batch",
            f"{strategy['micro_batch_size']}, {strategy['gradient_accumulation_steps']} a step and replica",
        ),
        ("global batch", f"{job['global_batch_size']:,} sequences of {job['sequence_length']:,} tokens"),
        ("precision", job["precision"]),
        ("recompute", strategy["activation_checkpointing"]),
        ("offload", ", ".join(offload) or "none"),
        ("attention", strategy["attention"].replace("_", " ")),
        (
            "promise",
            f"{plan['throughput']['tokens_per_second_per_gpu']:,.0f} tokens/s/{unit_of(plan)}, "
            f"within {error['throughput_error']:.0%}",
        ),
        (
            "memory",
            f"{told_bytes(memory['peak_bytes'])} of {told_bytes(memory['usable_bytes'])}, within {error['memory_error']:.0%}",
        ),
    ]
    if plan["cost"].get("usd") is not None:
        rows.append(("cost", f"${plan['cost']['usd']:,.2f}"))
    rows += [("note", note) for note in plan.get("notes", ())]
    return rows


def speed_hint(plan: Mapping[str, Any], speed: float | None, predicted: float) -> str:
    if not speed:
        return ""
    text = f"Median {speed:,.0f}: {speed / predicted - 1:+.0%} of the plan"
    wanted = plan.get("wanted")
    return text + (f", {speed / wanted - 1:+.0%} of the target." if wanted else ".")


def told_event(event: Event) -> dict[str, Any]:
    clock = time.strftime("%m-%d %H:%M:%S", time.gmtime(event.time_unix_s))
    return {"time": clock, "kind": event.kind, "step": event.step, "cause": event.cause}


# Numbers -------------------------------------------------------------------------------------------------------------


def finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and abs(value) < float("inf") else None


def mean(values: NDArray[np.float64]) -> float | None:
    """Return the mean of the numbers that are finite."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def median(values: NDArray[np.float64]) -> float | None:
    """Return the median of the numbers that are finite."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def told_bytes(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.0f} KiB"


def told_s(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
