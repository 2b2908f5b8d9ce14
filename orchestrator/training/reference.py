"""The reference of dpo: how likely each answer was to the weights that training begins with. It is worked out once and kept with
the run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from clusters.files import publish
from orchestrator.training.batches import Share, cut
from orchestrator.training.data import Dataset
from orchestrator.training.losses import PairLogProbabilities
from orchestrator.training.rows import RowDataset
from strategies.engines.engine import Session


def add_references(
    session: Session, datasets: Iterable[Dataset | None], share: Share, run_directory: Path, *, copies: int
) -> None:
    """Gives each dataset of rows the log-probabilities of its answers under the session's weights, which are the first ones;
    collective. A run that is started again reads what its first start left in the run folder.

    Args:
        copies: ranks of a tensor group, which work out the same.
    """
    for dataset in datasets:
        if isinstance(dataset, RowDataset):
            _add_reference(session, dataset, share, run_directory, copies)


def _add_reference(session: Session, dataset: RowDataset, share: Share, run_directory: Path, copies: int) -> None:
    file = run_directory / f"reference-{dataset.split}-{dataset.index.fingerprint[:16]}.npy"
    shape = (len(dataset), dataset.num_pairs_of_a_row, 2)
    found = _read(file, shape)
    if found is None:
        found = _computed(session, dataset, share, shape, copies)
        if dist.get_rank() == 0:
            partial = file.with_name(f"{file.stem}.{os.getpid()}.npy")
            np.save(partial, found)
            publish(partial, file)
    dataset.reference_BP2 = found


def _read(file: Path, shape: tuple[int, int, int]) -> NDArray[np.float64] | None:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float64 else None


def _computed(
    session: Session, dataset: RowDataset, share: Share, shape: tuple[int, int, int], copies: int
) -> NDArray[np.float64]:
    """Each replica works out its rows; `copies` ranks of a tensor group tell the same."""
    total = torch.zeros(shape, dtype=torch.float64, device=share.device)
    told = session.scores(cut(dataset, np.arange(len(dataset)), share), PairLogProbabilities())
    for rows, of_batch in zip(share.rows(len(dataset)), told, strict=True):
        if of_batch is None:
            continue
        values = of_batch.double().view(len(rows), *shape[1:])
        for row, value in zip(rows, values, strict=True):
            if row is not None:
                total[row] = value / copies
    dist.all_reduce(total)
    return total.cpu().numpy()
