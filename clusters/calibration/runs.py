"""The lessons of finished runs for a cluster file: how wrong its plans have been."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clusters import describe
from clusters.files import locked
from clusters.hardware import Calibration
from clusters.inventory.file import read_mapping, write_mapping

PRIOR_ERROR = {"tokens_per_second": 0.30, "peak_bytes": 0.05}
"""Relative error of a measured machine's plans before any run was seen. Rates measured on an idle machine promised up to
1.4 times the tokens/s that training then reached on it, by its load. Bytes of live tensors were within 5 %."""
PRIOR_RUNS = 3
"""How many runs the prior counts for: one lucky run does not make a model exact."""
FIELDS = {"tokens_per_second": "throughput_error", "peak_bytes": "memory_error"}
ERRORS = ("throughput_error", "memory_error", "throughput_ratio", "throughput_deviation", "num_runs")
"""Fields of a calibration that the runs of its file decide."""
KEPT_RUNS = 1000


def stated_error(errors: Sequence[float], *, prior: float, prior_runs: int = PRIOR_RUNS) -> float:
    """Root mean square of the relative errors, shrunk towards the prior: sqrt((m p^2 + sum e^2) / (m + n))."""
    return math.sqrt((prior_runs * prior**2 + math.fsum(error**2 for error in errors)) / (prior_runs + len(errors)))


def with_run(
    mapping: Mapping[str, Any], predicted: Mapping[str, float], measured: Mapping[str, float], *, time_unix_s: int
) -> dict[str, Any]:
    """Pure: the cluster file's mapping with one more run, its stated errors computed anew from all of them."""
    usable = [name for name in FIELDS if predicted.get(name) and measured.get(name)]
    if not usable:
        raise ValueError(f"a finished run tells predicted and measured of {' or '.join(FIELDS)}, above 0")
    run = {
        "time_unix_s": time_unix_s,
        "predicted": {name: float(predicted[name]) for name in usable},
        "measured": {name: float(measured[name]) for name in usable},
    }
    runs = [*mapping.get("runs", ()), run][-KEPT_RUNS:]
    calibration = dict(mapping.get("calibration", {})) | {"num_runs": len(runs)}
    for name, field in FIELDS.items():
        errors = [
            run["measured"][name] / run["predicted"][name] - 1
            for run in runs
            if name in run["measured"] and name in run["predicted"]
        ]
        if errors:
            calibration[field] = round(stated_error(errors, prior=PRIOR_ERROR[name]), 4)
            if name == "tokens_per_second":
                ratios = [math.log(1 + error) for error in errors]
                calibration["throughput_ratio"] = round(math.exp(statistics.fmean(ratios)), 4)
                if len(ratios) > 1:
                    calibration["throughput_deviation"] = round(statistics.stdev(ratios), 4)
    return {**mapping, "calibration": calibration, "runs": runs}


def append_run(
    cluster_file: str | Path, predicted: Mapping[str, float], measured: Mapping[str, float], *, begin: bool = False
) -> None:
    """Append a finished run to the file of its cluster.

    Args:
        predicted, measured: tokens_per_second of one accelerator, peak_bytes of the live tensors of its fullest one.
        begin: the file may be absent and is begun then: a record of runs alone, as `machine_record` has them.

    ValueError where the file cannot be read, OSError where it cannot be written."""
    path = Path(cluster_file)
    with locked(path):
        before = {} if begin and not path.exists() else read_mapping(path)
        write_mapping(path, with_run(before, predicted, measured, time_unix_s=int(time.time())))


def with_record(calibration: Calibration, record: Path) -> Calibration:
    """The calibration with the errors that the runs of a record showed. Absent or unreadable: none are known."""
    if not record.exists():
        return calibration
    try:
        shown = read_mapping(record).get("calibration", {})
        known = {name: shown[name] for name in ERRORS if name in shown}
        section = describe.plain(calibration) | known
        return describe.section_of(Calibration, {"calibration": section}, "calibration", str(record))
    except (ValueError, TypeError):
        return calibration
