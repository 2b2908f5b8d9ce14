"""The sequences that a replica sees at a step: a function of the seed and the step, cut by the strategy, made one step ahead.

B micro batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orchestrator.training.data import Dataset, batch_indices
from strategies.engines.engine import MicroBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One replica's part of every batch."""

    replica: int
    num_replicas: int
    micro_batch_size: int
    device: torch.device

    def rows(self, num_sequences: int) -> list[list[int | None]]:
        """Places in the global batch, micro batch by micro batch; None fills up the last ones.

        Micro batch i of replica r is the (i x replicas + r)-th slice, so that a batch which does not divide leaves
        every replica about as much to do."""
        micro = self.micro_batch_size
        firsts = [
            (i * self.num_replicas + self.replica) * micro
            for i in range(-(-num_sequences // (micro * self.num_replicas)))
        ]
        return [[row if row < num_sequences else None for row in range(first, first + micro)] for first in firsts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    step: int
    indices: NDArray[np.int64]
    """Samples of the global batch, in order."""
    micro_batches: list[MicroBatch]
    """Micro batches of this replica."""
    num_targets: int
    """Targets of the global batch."""


def cut(dataset: Dataset, indices: NDArray[np.int64], share: Share) -> Iterator[MicroBatch]:
    """Return this replica's micro batches; a filling sequence repeats a real one with weight 0."""
    for rows in share.rows(len(indices)):
        weight_B = torch.tensor([0.0 if row is None else 1.0 for row in rows])
        mine = indices[[0 if row is None else row for row in rows]]
        inputs, targets = dataset.sequences(mine)
        target_ids_BS = torch.from_numpy(targets)
        target_ids_BS[weight_B == 0] = IGNORED
        yield MicroBatch(
            input_ids_BS=torch.from_numpy(inputs).to(share.device, non_blocking=True),
            target_ids_BS=target_ids_BS.to(share.device, non_blocking=True),
            weight_B=weight_B.to(share.device, non_blocking=True),
            inputs=_on(share.device, dataset.inputs(mine)),
            labels=_on(share.device, dataset.labels(mine)),
        )


def _on(device: torch.device, arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


class Batches:
    """The batches of steps first_step, ..., each made while the one before it is trained on."""

    def __init__(self, dataset: Dataset, share: Share, *, seed: int, global_batch_size: int, first_step: int) -> None:
        self.dataset, self.share, self.seed, self.global_batch_size = dataset, share, seed, global_batch_size
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batch")
        self._next: Future[Batch] = self._pool.submit(self._make, first_step)

    def next(self) -> Batch:
        batch = self._next.result()
        self._next = self._pool.submit(self._make, batch.step + 1)
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _make(self, step: int) -> Batch:
        indices = batch_indices(self.seed, step - 1, self.global_batch_size, len(self.dataset))
        return Batch(
            step=step,
            indices=indices,
            micro_batches=list(cut(self.dataset, indices, self.share)),
            num_targets=self.dataset.num_targets(indices),
        )
