"""Runs a step's micro batches: one after the other, or through the stages of a pipeline.

torch.distributed.pipelining's schedules are not used: its stages average what must be summed, keep every output, fix FSDP2's
gathers, and learn shapes by messages of their own. What is left, sending and receiving in order, is this file.

B micro batch, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from strategies.engines.engine import Build, Loss, MicroBatch
from strategies.pipeline.schedules import Action, orders, received
from strategies.strategy import SPLIT_BACKWARD, Stage
from strategies.tensor.region import Pending, weight_gradient
from strategies.zero.states import DTYPES, PipelineStates, States


class Runner(Protocol):
    """Forward and backward passes of a step."""

    def train(self, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor:
        """Adds up the gradients of factor x loss. What the loss tells, told_K, summed in fp64; 0 where another rank holds
        the head."""

    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """What the loss tells, told_K; None where another rank holds the head."""

    def settle(self) -> None:
        """After the last of several evaluations."""


def context_of(build: Build, batch: MicroBatch) -> tuple[Any, ...]:
    """What embedding, blocks and head take after their input: what the module makes of the batch's further inputs."""
    if not batch.inputs:
        return ()
    module: Any = build.module
    return (module.context(**{name: value.to(build.device) for name, value in batch.inputs.items()}),)


def none_told(build: Build, loss: Loss) -> Tensor:
    """told_K before the first micro batch."""
    return torch.zeros(len(loss.names), dtype=torch.float64, device=build.device)


class PlainRunner:
    """The whole model on this rank."""

    def __init__(self, build: Build, states: States, loss: Loss) -> None:
        self.build, self.states, self.loss = build, states, loss

    def train(self, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor:
        total = none_told(self.build, self.loss)
        for index, batch in enumerate(micro_batches):
            self.states.micro_batch(last=index == len(micro_batches) - 1)
            loss, trained = self._loss(batch)
            self._backward(trained * factor)
            total += loss
            del loss, trained
        return total

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        return self._loss(batch)[0]

    def settle(self) -> None:
        """Nothing is on its way."""

    def _loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        output = self.build.module(batch.input_ids_BS.to(self.build.device), *context_of(self.build, batch))
        return self.loss(self.build.region, output, batch)


class _Flight(NamedTuple):
    """What a stage keeps of a micro batch between its forward and its backward pass."""

    given: Tensor | None
    """What came in; its gradient goes back. None: token ids."""
    result: GradientEdge


class PipelineRunner:
    """The stages of one pipeline rank."""

    def __init__(self, build: Build, states: PipelineStates, loss: Loss) -> None:
        self.build, self.states, self.loss = build, states, loss
        strategy, mesh = build.strategy, build.mesh
        self.strategy, self.rank = strategy, mesh.rank("pipeline")
        self.stages = {stage.stage: stage for stage in strategy.stages}
        self.held = sorted(stage.stage for stage in build.requests["held"])
        self.channels = build.requests["channels"]
        self.peers = _column(build)
        self.dtype = DTYPES[build.precision]
        module: Any = build.module
        self.hidden = module.hidden_size
        self.splits = strategy.pipeline_schedule in SPLIT_BACKWARD
        module.forward = self._stage_forward
        self.sends: dict[Action, tuple[Any, Tensor]] = {}
        self.known: Mapping[Action, Sequence[Action]] = {}
        self.receipts: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        self.local: dict[tuple[Any, ...], Tensor] = {}

    # The two passes --------------------------------------------------------------------------------------------------

    def _stage_forward(self, x: Tensor, stage: Stage, *context: Any) -> Tensor:
        module: Any = self.build.module
        if stage.embedding:
            x = module.embed(x, *context)
        for index in range(stage.first_layer, stage.first_layer + stage.num_layers):
            x = module.blocks._modules[str(index)](x, *context)
        return module.head(x) if stage.head else x

    def train(self, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor:
        strategy = self.strategy
        asked = (
            strategy.pipeline_schedule,
            strategy.pipeline_parallel_degree,
            strategy.num_virtual_stages,
            len(micro_batches),
        )
        actions, self.known = orders(*asked)[self.rank], received(*asked, self.rank)
        flights: dict[tuple[int, int], _Flight] = {}
        weights: dict[tuple[int, int], Pending] = {}
        total = none_told(self.build, self.loss)
        for index, action in enumerate(actions):
            for ahead in actions[index : index + 2]:  # the next one's input travels while this one computes
                self._ask(ahead, micro_batches)
            key = (action.stage, action.micro_batch)
            if action.kind == "forward":
                flights[key], loss = self._forward(action, micro_batches, factor)
                if loss is not None:
                    total += loss
            elif action.kind == "weights":
                self._weights(weights.pop(key), done=action.micro_batch == len(micro_batches) - 1)
            else:
                # A split backward brings the last gradients after its last pass over the inputs.
                self.states.backward(
                    self.stages[action.stage],
                    last=index == len(actions) - 1 and not self.splits,
                    done=action.micro_batch == len(micro_batches) - 1,
                )
                self._backward(action, flights.pop(key))
                if self.splits:
                    weights[key] = self._pending()
        self.settle()
        return total

    def _forward(
        self, action: Action, micro_batches: Sequence[MicroBatch], factor: float
    ) -> tuple[_Flight, Tensor | None]:
        stage, batch = self.stages[action.stage], micro_batches[action.micro_batch]
        given = None if stage.embedding else self._take(action).requires_grad_()
        x = batch.input_ids_BS.to(self.build.device) if given is None else given
        result = self.build.module(x, stage, *context_of(self.build, batch))
        if stage.head:
            loss, trained = self.loss(self.build.region, result, batch)
            return _Flight(given, get_gradient_edge(trained * factor)), loss
        self._give(Action("forward", action.stage + 1, action.micro_batch), result.detach())
        return _Flight(given, get_gradient_edge(result)), None

    def _backward(self, action: Action, flight: _Flight) -> None:
        stage = self.stages[action.stage]
        gradients = None if stage.head else [self._take(action)]
        torch.autograd.backward([flight.result], gradients)
        if flight.given is not None:
            gradient, flight.given.grad = flight.given.grad, None
            assert gradient is not None
            self._give(Action(action.kind, action.stage - 1, action.micro_batch), gradient)

    def _pending(self) -> Pending:
        """Takes what the pass has collected. The list stays: forward passes under way hold it."""
        pending = self.build.region.pending
        assert pending is not None
        taken = list(pending)
        pending.clear()
        return taken

    def _weights(self, pending: Pending, *, done: bool) -> None:
        """The gradients of weights that a backward pass over the inputs left; autograd's hooks run as in a whole one. What has
        been used is let go."""
        pending.reverse()
        while pending:
            weight, gradient, x = pending.pop()
            of_weight = weight_gradient(gradient, x)
            del gradient, x
            torch.autograd.backward([weight], [of_weight])
            del of_weight
            self.states.deferred(weight, pending[-1][0] if pending else None, done=done)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        self.settle()  # of the batch before, for which everyone has sent everything
        self.known = {}
        loss = None
        for number in self.held:
            action, stage = Action("forward", number, 0), self.stages[number]
            self._ask(action, [batch])
            x = batch.input_ids_BS.to(self.build.device) if stage.embedding else self._take(action)
            result = self.build.module(x, stage, *context_of(self.build, batch))
            if stage.head:
                loss, _ = self.loss(self.build.region, result, batch)
            else:
                self._give(Action("forward", number + 1, 0), result)
        return loss

    def settle(self) -> None:
        self._let_go(tuple(self.sends))

    # Messages: `action` is the pass that they are for ----------------------------------------------------------------

    def _source(self, action: Action) -> int | None:
        """The pipeline rank that an action's input comes from; None: there is none."""
        number = action.stage + (-1 if action.kind == "forward" else 1)
        stage = self.stages.get(number)
        return None if stage is None or action.kind == "weights" else stage.pipeline_rank

    def _ask(self, action: Action, micro_batches: Sequence[MicroBatch]) -> None:
        source = self._source(action)
        if source is None or source == self.rank or action in self.receipts:
            return
        batch, sequence = micro_batches[action.micro_batch].input_ids_BS.shape
        shape = self.build.region.boundary_shape(batch, sequence, self.hidden)
        buffer = torch.empty(shape, dtype=self.dtype, device=self.build.device)
        work = dist.irecv(buffer, self.peers[source], group=self._channel(action), tag=self._tag(action))
        self.receipts[action] = work, buffer

    def _take(self, action: Action) -> Tensor:
        if self._source(action) == self.rank:
            return self.local.pop(action)
        work, buffer = self.receipts.pop(action)
        work.wait()
        # gloo never says of a send that it is complete before it is waited for; on NCCL the host runs ahead of all of them.
        self._let_go(self.known.get(action, ()))
        return buffer

    def _give(self, action: Action, tensor: Tensor) -> None:
        target = self.stages[action.stage].pipeline_rank
        if target == self.rank:
            self.local[action] = tensor
            return
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.peers[target], group=self._channel(action), tag=self._tag(action))
        self.sends[action] = work, tensor

    def _channel(self, action: Action) -> Any:
        return self.channels["forward" if action.kind == "forward" else "backward", action.stage]

    def _tag(self, action: Action) -> int:
        """gloo tells messages apart by it; NCCL goes by their order."""
        return 2 * (action.micro_batch * len(self.stages) + action.stage) + (action.kind != "forward")

    def _let_go(self, messages: Iterable[Action]) -> None:
        for message in messages:
            work, _ = self.sends.pop(message)
            work.wait()


def _column(build: Build) -> list[int]:
    """The ranks of the world that stand where this one does, by pipeline rank."""
    mesh = build.mesh
    place = (mesh.rank("replicate"), mesh.rank("tensor"), mesh.rank("shard"))
    return [int(mesh.ranks[(rank, *place)]) for rank in range(mesh.sizes["pipeline"])]
