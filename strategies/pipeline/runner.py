"""Runs a step's micro batches: one after the other, or through the stages of a pipeline.

torch.distributed.pipelining's schedules are not used: its stages average what must be summed, keep every output, fix FSDP2's
gathers, and learn shapes by messages of their own. What is left is this file, which carries out the events of messages.py.

B micro batch, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from strategies.engines.engine import Build, Loss, MicroBatch
from strategies.pipeline.messages import Channel, Event, pipeline_of
from strategies.pipeline.schedules import Action
from strategies.strategy import SPLIT_BACKWARD, Stage
from strategies.tensor.region import Pending, weight_gradient
from strategies.zero.states import DTYPES, PipelineStates, States


class Runner(Protocol):
    """Forward and backward passes of a step."""

    loss: Loss

    def train(self, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor:
        """Adds up the gradients of factor x loss. What the loss tells, told_K, summed in fp64; 0 where another rank holds
        the head."""

    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """Return what the loss tells, told_K; None where another rank holds the head."""

    def settle(self) -> None:
        """After the last of several evaluations."""


def context_of(build: Build, batch: MicroBatch) -> tuple[Any, ...]:
    """Return what embedding, blocks and head take after their input: what the module makes of the batch's further inputs."""
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
    """Tensors that a stage keeps of a micro batch between its forward and its backward pass."""

    given: Tensor | None
    """The tensor that came in; its gradient goes back. None: token ids."""
    result: GradientEdge


class PipelineRunner:
    """The stages of one pipeline rank."""

    def __init__(self, build: Build, states: PipelineStates, loss: Loss) -> None:
        self.build, self.states, self.loss = build, states, loss
        strategy = build.strategy
        self.rank, self.pipeline = build.mesh.rank("pipeline"), pipeline_of(strategy)
        self.stages = {stage.stage: stage for stage in strategy.stages}
        self.channels: Mapping[Channel, Any] = build.requests.channels
        self.peers = _column(build)
        self.dtype = DTYPES[build.precision]
        module: Any = build.module
        self.hidden = module.hidden_size
        self.splits = strategy.pipeline_schedule in SPLIT_BACKWARD
        module.forward = self._stage_forward
        self.flights: dict[tuple[int, int], _Flight] = {}
        self.pending: dict[tuple[int, int], Pending] = {}
        """(stage, micro batch) -> what a split backward pass left for the weights."""
        self.inputs: dict[Action, Tensor] = {}
        """Pass -> what it takes in: a message that has come, or what another stage of this rank made."""
        self.outputs: dict[Action, Tensor] = {}
        self.receipts: dict[Action, tuple[Any, Tensor]] = {}
        self.sends: dict[Action, tuple[Any, Tensor]] = {}

    # The two passes --------------------------------------------------------------------------------------------------

    def _stage_forward(self, x: Tensor, stage: Stage, *context: Any) -> Tensor:
        module: Any = self.build.module
        if stage.embedding:
            x = module.embed(x, *context)
        for index in range(stage.first_layer, stage.first_layer + stage.num_layers):
            x = module.blocks._modules[str(index)](x, *context)
        return module.head(x) if stage.head else x

    def train(self, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor:
        events = self.pipeline.step(len(micro_batches), self.rank)
        last = next(event.action for event in reversed(events) if event.verb == "run")
        self.flights, self.pending = {}, {}
        total = none_told(self.build, self.loss)
        for event in events:
            action = event.action
            if event.verb != "run" or action is None:
                self._exchange(event, micro_batches)
                continue
            done = action.micro_batch == len(micro_batches) - 1
            if action.kind == "forward":
                loss = self._forward(action, micro_batches, factor)
                if loss is not None:
                    total += loss
            elif action.kind == "weights":
                self._weights(self.pending.pop((action.stage, action.micro_batch)), done=done)
            else:
                # A split backward brings the last gradients after its last pass over the inputs.
                self.states.backward(self.stages[action.stage], last=action == last and not self.splits, done=done)
                self._backward(action)
        return total

    def _forward(self, action: Action, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor | None:
        stage, batch = self.stages[action.stage], micro_batches[action.micro_batch]
        given = None if stage.embedding else self.inputs.pop(action).requires_grad_()
        x = batch.input_ids_BS.to(self.build.device) if given is None else given
        result = self.build.module(x, stage, *context_of(self.build, batch))
        key = (action.stage, action.micro_batch)
        if stage.head:
            loss, trained = self.loss(self.build.region, result, batch)
            self.flights[key] = _Flight(given, get_gradient_edge(trained * factor))
            return loss
        self._made(action, result.detach())
        self.flights[key] = _Flight(given, get_gradient_edge(result))
        return None

    def _backward(self, action: Action) -> None:
        key = (action.stage, action.micro_batch)
        flight = self.flights.pop(key)
        gradients = None if self.stages[action.stage].head else [self.inputs.pop(action)]
        torch.autograd.backward([flight.result], gradients)
        if flight.given is not None:
            gradient, flight.given.grad = flight.given.grad, None
            assert gradient is not None
            self._made(action, gradient)
        if self.splits:
            self.pending[key] = self._collected()

    def _made(self, action: Action, tensor: Tensor) -> None:
        """Keeps what a pass made for the next one, which takes it from here or is sent it."""
        following = self.pipeline.following(action)
        assert following is not None
        (self.inputs if self.pipeline.channel(following) is None else self.outputs)[following] = tensor

    def _collected(self) -> Pending:
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
        loss = None
        for event in self.pipeline.evaluation(self.rank):
            action = event.action
            if event.verb != "run" or action is None:
                self._exchange(event, [batch])
                continue
            stage = self.stages[action.stage]
            x = batch.input_ids_BS.to(self.build.device) if stage.embedding else self.inputs.pop(action)
            result = self.build.module(x, stage, *context_of(self.build, batch))
            if stage.head:
                loss, _ = self.loss(self.build.region, result, batch)
            else:
                self._made(action, result)
        return loss

    def settle(self) -> None:
        for message in tuple(self.sends):
            self._release(message)

    # Messages: `action` is the pass that they are for ----------------------------------------------------------------

    def _exchange(self, event: Event, micro_batches: Sequence[MicroBatch]) -> None:
        action = event.action
        if action is None:
            self.settle()
        elif event.verb == "receive":
            self._receive(action, micro_batches)
        elif event.verb == "take":
            work, self.inputs[action] = self.receipts.pop(action)
            work.wait()
        elif event.verb == "send":
            tensor = self.outputs.pop(action).contiguous()
            group, peer = self._line(action)
            self.sends[action] = dist.isend(tensor, peer, group=group), tensor
        else:
            self._release(action)

    def _receive(self, action: Action, micro_batches: Sequence[MicroBatch]) -> None:
        batch, sequence = micro_batches[action.micro_batch].input_ids_BS.shape
        shape = self.build.region.boundary_shape(batch, sequence, self.hidden)
        buffer = torch.empty(shape, dtype=self.dtype, device=self.build.device)
        group, peer = self._line(action)
        self.receipts[action] = dist.irecv(buffer, peer, group=group), buffer

    def _line(self, action: Action) -> tuple[Any, int]:
        """(group, rank of the world at the other end) of the channel that brings a pass its input."""
        channel = self.pipeline.channel(action)
        assert channel is not None
        other = channel.source if channel.target == self.rank else channel.target
        return self.channels[channel], self.peers[other]

    def _release(self, message: Action) -> None:
        """gloo never says of a send that it is complete before it is waited for; on NCCL the host runs ahead of all of them."""
        work, _ = self.sends.pop(message)
        work.wait()


def _column(build: Build) -> list[int]:
    """The ranks of the world that stand where this one does, by pipeline rank."""
    mesh = build.mesh
    place = (mesh.rank("replicate"), mesh.rank("tensor"), mesh.rank("shard"))
    return [int(mesh.ranks[(rank, *place)]) for rank in range(mesh.sizes["pipeline"])]
