"""AdamW on the host's processor: master weights and moments live in host memory or in a file, and gradients come down and
stepped weights go up in pieces, through a bounded number of buffers.

Source: ZeRO-Offload, arXiv:2101.06840, and ZeRO-Infinity, arXiv:2104.07857. We depart: nothing is stepped late, so that the
run is the undisturbed one bit for bit on the same kind of processor. In a file: the pieces ahead are read, and the ones
behind are written, by threads while one is stepped."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.engines.engine import OptimizerSettings
from strategies.offload import host
from strategies.offload.cost import NUM_SLOTS, PIECE_ELEMENTS
from strategies.offload.files import ScratchFile
from strategies.zero.states import Adam, Shard


class Piece(NamedTuple):
    """Some elements of a shard, one after the other. Cut at whole vectors of the kernel, so that no bit depends on it."""

    shard: Shard
    """Views of the states where they live."""
    first: int
    last: int


class Slot:
    """Host buffers of one piece."""

    def __init__(self, states: OffloadedAdam, gradient: torch.dtype, parameter: torch.dtype) -> None:
        size, device = states.piece_elements, states.device
        self.gradient = host.empty((size,), gradient, device)
        self.wide = self.gradient if gradient == states.dtype else host.empty((size,), states.dtype, device)
        self.parameter = host.empty((size,), parameter, device)
        self.states = [host.empty((size,), states.dtype, device) for _ in range(3)] if states.file else []
        self.job: Future[None] | None = None
        """Writes what the slot held and reads what it will hold."""
        on_gpu = device.type == "cuda"
        self.arrived: Any = torch.cuda.Event() if on_gpu else None
        self.sent: Any = torch.cuda.Event() if on_gpu else None

    def tensors(self) -> list[Tensor]:
        return [self.gradient, self.wide, self.parameter, *self.states]

    def down(self, gradient: Tensor) -> None:
        """Begins to fetch a gradient."""
        self.gradient[: gradient.numel()].copy_(gradient, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()

    def widened(self, count: int, scale: float) -> Tensor:
        """The gradient that came down, times scale, in the masters' precision."""
        if self.arrived is not None:
            self.arrived.synchronize()
        wide = self.wide[:count]
        if self.wide is not self.gradient:
            wide.copy_(self.gradient[:count])
        return wide.mul_(scale) if scale != 1.0 else wide

    def up(self, master: Tensor, target: Tensor) -> None:
        """Sends stepped weights in the precision of the parameters."""
        if self.sent is not None:
            self.sent.synchronize()
        parameter = self.parameter[: master.numel()]
        parameter.copy_(master)
        target.copy_(parameter, non_blocking=True)
        if self.sent is not None:
            self.sent.record()

    def wait(self) -> None:
        if self.job is not None:
            self.job.result()
            self.job = None


class OffloadedAdam(Adam):
    """The states of the parameters named in `away` on the host or in `file`, those of the others on the device."""

    def __init__(
        self,
        settings: OptimizerSettings,
        device: torch.device,
        dtype: torch.dtype,
        *,
        away: frozenset[str],
        file: ScratchFile | None,
    ) -> None:
        super().__init__(settings, torch.device("cpu"), dtype)
        self.device, self.away, self.file = device, away, file
        self.resident = Adam(settings, device, dtype)
        self.pieces: list[Piece] = []
        """Pieces in the order in which a step takes them."""
        self.next = 0
        self.piece_elements = 0
        self.slots: list[Slot] = []
        self.pool = ThreadPoolExecutor(NUM_SLOTS, "offload") if file and not file.is_fake else None

    def shard(self, name: str, shape: torch.Size, rows: Tensor, *, apart: bool) -> Shard:
        if name not in self.away:
            return self.resident.shard(name, shape, rows, apart=apart)
        with host.placed("host"):
            made = [
                self.file.tensor(rows.shape, self.dtype)
                if self.file
                else host.empty(rows.shape, self.dtype, self.device).zero_()
                for _ in range(3)
            ]
        shard = Shard(name, shape, made[0], made[1], made[2], True)
        flat = rows.detach().reshape(-1)
        for first in range(0, flat.numel(), PIECE_ELEMENTS):
            last = min(first + PIECE_ELEMENTS, flat.numel())
            master, exp_avg, exp_avg_sq = (each.view(-1)[first:last] for each in made)
            piece = Shard(name, shape, master, exp_avg, exp_avg_sq, True)
            if self.file and not self.file.is_fake:
                self.file.write(master, flat[first:last].to("cpu", self.dtype).contiguous())
            else:
                master.copy_(flat[first:last])
            self.pieces.append(Piece(piece, first, last))
            self.piece_elements = max(self.piece_elements, last - first)
        return shard

    def advance(self) -> None:
        super().advance()
        self.resident.advance()
        self.next = 0
        for index in range(len(self.slots)):
            self._turn(None, index)

    def _turn(self, done: int | None, coming: int) -> None:
        """A slot, behind the interpreter's back: writes the piece that was stepped in it, reads the one that comes."""
        if self.pool is None or self.file is None:
            return
        slot = self.slots[coming % len(self.slots)]
        pieces = [self.pieces[i] if i is not None and i < len(self.pieces) else None for i in (done, coming)]
        slot.wait()
        slot.job = self.pool.submit(_exchange, self.file, slot.states, *pieces)

    def step(
        self,
        shards: Sequence[Shard],
        gradients: Sequence[Tensor],
        into: Sequence[Tensor],
        *,
        scale: float,
        learning_rate: float,
    ) -> None:
        rows = list(zip(shards, gradients, into, strict=True))
        stay = [row for row in rows if row[0].name not in self.away]
        if stay:
            mine, gradients_of_mine, targets = zip(*stay, strict=True)
            self.resident.step(mine, gradients_of_mine, targets, scale=scale, learning_rate=learning_rate)
        leave = {shard.name: (g.view(-1), target.view(-1)) for shard, g, target in rows if shard.name in self.away}
        if leave and self.pieces and not self.slots:
            gradient, target = next(iter(leave.values()))
            self.slots = [Slot(self, gradient.dtype, target.dtype) for _ in range(min(NUM_SLOTS, len(self.pieces)))]
            for index in range(len(self.slots)):
                self._turn(None, index)
        first = True
        while self.next < len(self.pieces) and self.pieces[self.next].shard.name in leave:
            self._step_piece(leave, first, scale, learning_rate)
            first = False
        if self.next == len(self.pieces):  # what is in the file is whole between two steps
            for slot in self.slots:
                slot.wait()

    def _step_piece(self, leave: dict[str, Any], first: bool, scale: float, learning_rate: float) -> None:
        index, slots = self.next, self.slots
        shard, begin, end = self.pieces[index]
        slot = slots[index % len(slots)]
        gradient, target = leave[shard.name]
        if first:
            slot.down(gradient[begin:end])
        wide = slot.widened(end - begin, scale)
        following = self.pieces[index + 1] if index + 1 < len(self.pieces) else None
        if following is not None and following.shard.name in leave:
            coming = leave[following.shard.name][0][following.first : following.last]
            slots[(index + 1) % len(slots)].down(coming)
        held = shard
        if self.file:
            slot.wait()
            master, exp_avg, exp_avg_sq = (each[: end - begin] for each in slot.states)
            held = Shard(shard.name, shard.shape, master, exp_avg, exp_avg_sq, True)
        self.update([held], [wide], learning_rate)
        slot.up(held.master, target[begin:end])
        self._turn(index, index + len(slots))
        self.next += 1

    def loaded(self, step: int, shards: Sequence[Shard], into: Sequence[Tensor]) -> None:
        super().loaded(step, shards, into)
        self.resident.num_steps.fill_(step)

    def tensors(self, shards: Sequence[Shard]) -> dict[str, list[Tensor]]:
        away = [shard for shard in shards if shard.name in self.away]
        states = [t for shard in away for t in (shard.master, shard.exp_avg, shard.exp_avg_sq)]
        buffers = [t for slot in self.slots for t in slot.tensors()]
        return {
            **self.resident.tensors([shard for shard in shards if shard.name not in self.away]),
            "host": buffers if self.file else states + buffers,
            "nvme": states if self.file else [],
        }

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        if self.file is not None:
            self.file.close()


def _exchange(file: ScratchFile, buffers: Sequence[Tensor], done: Piece | None, coming: Piece | None) -> None:
    for piece, move in ((done, file.write), (coming, file.read)):
        if piece is not None:
            shard, first, last = piece
            for place, buffer in zip((shard.master, shard.exp_avg, shard.exp_avg_sq), buffers, strict=True):
                move(place, buffer[: last - first])
