"""PPO's four models on one cluster: which of them is where when, in bytes; and a step's seconds. Pure.

A step writes responses with the actor (prefill, then a token at a time with a KV cache), scores them with all four models, and
trains actor and critic on them. Reference and reward model never change. InstructGPT, arXiv:2203.02155; the switch between the
layout of generation and that of training is the hybrid engine of DeepSpeed-Chat, arXiv:2308.01320, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

from clusters.cluster import Cluster
from orchestrator.models.architecture import Architecture, num_parameters
from orchestrator.models.lora import Lora
from orchestrator.models.workloads import workload
from orchestrator.planner.problem import Choice, PlanError, Problem
from strategies.constants import TIME
from strategies.links import all_reduce_s, half_s
from strategies.offload.cost import host_bytes_per_s
from strategies.price.memory import reserve_bytes
from strategies.price.roofline import ELEMENT, Roofline, roofline
from strategies.rank import Shape
from strategies.rooms import impossible
from strategies.shares import shares
from strategies.strategy import Offload, Strategy

Residence = Literal["whole", "sharded", "host", "shared"]
"""Frozen weights: whole on every GPU; dealt out and gathered a block at a time; so in host memory; or the actor's own without its
adapters, which costs nothing."""
SCORED_ROWS = 16
"""Responses that frozen models score at once."""
NO_PIPELINE = (
    "task ppo refuses pipelines: a response is written token by token through all layers, so that all stages but one would wait; "
    "zero_stage: 3 or tensor_parallel_degree share the weights"
)


@dataclass(frozen=True, kw_only=True)
class Rlhf:
    """One step of PPO: its models, and how long and how many its responses are."""

    actor: Architecture
    critic: Architecture
    reference: Architecture
    reward: Architecture
    prompt_tokens: int
    response_tokens: int
    rollouts: int
    """Responses of a step, over all replicas."""
    epochs: int = 1
    minibatches: int = 1
    """Optimizer steps of an epoch."""
    lora: Lora | None = None
    """Adapters that actor and critic train in the place of their weights."""
    eight_bit: bool = False
    """The optimizer's moments take 8 bits."""
    shares_reference: bool = False
    """The actor without its adapters is the reference."""

    @property
    def sequence_length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def problem(self, role: str, cluster: Cluster, precision: str) -> Problem:
        """Return how actor or critic is trained, as a question to the planner."""
        return Problem(
            arch=getattr(self, role),
            cluster=cluster,
            global_batch_size=-(-self.rollouts // self.minibatches),
            sequence_length=self.sequence_length,
            precision=precision,
            lora=self.lora,
            eight_bit=self.eight_bit,
            task="reward" if role == "critic" else "pretrain",
        )


class Layout(NamedTuple):
    """Where everything is."""

    choice: Choice
    """How actor and critic are trained."""
    frozen: Residence
    """Where the weights of reference and reward model are."""
    generation: int
    """GPUs that share each product while responses are written."""
    rows: int
    """Responses that they write at once."""


@dataclass(frozen=True, kw_only=True)
class RlhfPrice:
    """Bytes of the fullest GPU, and seconds of a step."""

    layout: Layout
    strategy: Strategy
    roles: tuple[Mapping[str, Any], ...]
    """[{role, model, trained, strategy, residence, bytes}], bytes on each GPU between the phases."""
    phases: Mapping[str, int]
    """Tensor bytes at the peak of each phase: generate, score, train_actor, train_critic."""
    peak_bytes: int
    usable_bytes: int
    host_bytes_per_node: int
    host_usable_bytes: int
    seconds: Mapping[str, float]
    """Seconds of a step: switch, prefill, decode, score, train_actor, train_critic."""

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes and self.host_bytes_per_node <= self.host_usable_bytes

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the price as JSON."""
        choice = self.layout.choice
        return {
            "fits": self.fits,
            "roles": [dict(role) for role in self.roles],
            "phases_bytes": dict(self.phases),
            "peak_bytes": self.peak_bytes,
            "usable_bytes": self.usable_bytes,
            "host_bytes_per_node": self.host_bytes_per_node,
            "step_s": self.step_s,
            "seconds": dict(self.seconds),
            "generation": {"tensor_parallel_degree": self.layout.generation, "rows": self.layout.rows},
            "training": {
                "tensor_parallel_degree": choice.tensor,
                "data_parallel_degree": choice.data,
                "zero_stage": choice.zero,
                "micro_batch_size": choice.micro,
                "activation_checkpointing": choice.recompute,
                "optimizer": choice.offload.optimizer,
            },
        }

    def told(self) -> str:
        """Return "tensor 8 x data 8, ZeRO 3, micro batch 4; written by 8 GPUs together, 64 at once; frozen weights sharded"."""
        choice, layout = self.layout.choice, self.layout
        parts = [f"tensor {choice.tensor} x data {choice.data}", f"ZeRO {choice.zero}", f"micro batch {choice.micro}"]
        parts += ["full recompute"] * (choice.recompute == "full") + ["optimizer on host"] * choice.offload.any
        together = f"{layout.generation} GPUs together" if layout.generation > 1 else "each GPU"
        return f"{', '.join(parts)}; written by {together}, {layout.rows} at once; frozen weights {layout.frozen}"


class Pricer:
    """One step of PPO on one cluster, priced under any layout. Keeps what layouts have in common."""

    def __init__(self, rlhf: Rlhf, cluster: Cluster, precision: str = "bf16") -> None:
        self.rlhf, self.cluster, self.precision, self.element = rlhf, cluster, precision, ELEMENT[precision]
        self.problems = {role: rlhf.problem(role, cluster, precision) for role in ("actor", "critic")}
        self._trained: dict[tuple[str, Choice], tuple[Strategy, int, int, int, float]] = {}

    @cached_property
    def num_actor(self) -> int:
        return num_parameters(self.rlhf.actor)

    def trained(self, role: str, choice: Choice) -> tuple[Strategy, int, int, int, float]:
        """Return of actor or critic (strategy, bytes between steps, tensor bytes at its peak, host bytes a node, seconds of an
        optimizer step)."""
        known = self._trained.get((role, choice))
        if known is None:
            problem = self.problems[role]
            strategy = problem.strategy(choice)
            memory = problem.memory(strategy)
            states = problem.rank_memory.states(strategy, shares(strategy).by_rank[0])
            resting = int(sum(states.gpu))
            peak = memory.stages.fullest().tensor_peak_bytes
            step_s = problem.time(strategy).step_s
            known = self._trained[role, choice] = strategy, resting, peak, memory.host_bytes_per_node, step_s
        return known

    def price(self, layout: Layout) -> RlhfPrice:
        """Return the bytes and seconds of a layout, fit or not."""
        rlhf, choice = self.rlhf, layout.choice
        strategy, actor_rests, actor_peak, actor_host, actor_s = self.trained("actor", choice)
        _, critic_rests, critic_peak, critic_host, critic_s = self.trained("critic", choice)
        frozen = {role: self._frozen_bytes(role, layout) for role in ("reference", "reward")}
        resting = sum(frozen.values())
        copy = self._copy_bytes(layout)
        rows, group = layout.rows, layout.generation
        phases = {
            "generate": actor_rests + critic_rests + resting + copy + self._generation_bytes(rows, group),
            "score": actor_rests + critic_rests + resting + self._score_bytes(rows),
            "train_actor": actor_peak + critic_rests + resting,
            "train_critic": critic_peak + actor_rests + resting,
        }
        tensors = max(phases.values())
        ranks = min(self.cluster.gpus_per_node, choice.num_gpus)
        on_host = sum(self._weights(role) for role in frozen) if layout.frozen == "host" else 0
        steps = rlhf.epochs * rlhf.minibatches
        memory = self.problems["actor"].memory(strategy)
        return RlhfPrice(
            layout=layout,
            strategy=strategy,
            roles=self._roles(layout, actor_rests, critic_rests, frozen),
            phases={name: int(size) for name, size in phases.items()},
            peak_bytes=int(tensors + reserve_bytes(int(tensors), self.cluster.accelerator.kind)),
            usable_bytes=memory.usable_bytes,
            host_bytes_per_node=int(actor_host + critic_host + on_host * ranks / choice.num_gpus),
            host_usable_bytes=memory.host_usable_bytes,
            seconds={
                "switch": self._switch_s(layout, copy),
                **self._generation_s(layout),
                "score": self._score_s(layout),
                "train_actor": steps * actor_s,
                "train_critic": steps * critic_s,
            },
        )

    # Bytes ----------------------------------------------------------------------------------------------------------

    def _weights(self, role: str) -> int:
        """Return the bytes of a frozen model; the reward model's table of outputs is one row."""
        if role == "reference" and self.rlhf.shares_reference and self.rlhf.lora is not None:
            return 0
        return num_parameters(getattr(self.rlhf, role)) * self.element

    def _frozen_bytes(self, role: str, layout: Layout) -> int:
        whole, arch = self._weights(role), getattr(self.rlhf, role)
        if layout.frozen == "whole" or not whole:
            return whole
        # Two blocks are at work or on their way, and the table of tokens.
        at_work = 2 * (whole / (arch.num_layers + 1)) + arch.vocab_size * arch.hidden_size * self.element
        resting = 0.0 if layout.frozen == "host" else whole / layout.choice.num_gpus
        return int(min(whole, resting + at_work))

    def _copy_bytes(self, layout: Layout) -> int:
        """Return the bytes of the actor's weights as they are written with, where training keeps them otherwise."""
        choice = layout.choice
        if choice.zero < 2 and choice.tensor == layout.generation and choice.offload.parameters == "none":
            return 0
        return int(self.num_actor * self.element / layout.generation)

    def _generation_bytes(self, rows: int, group: int) -> float:
        """Return the bytes of the KV cache at its longest, of a layer's while it grows, and of the prefill's activations and
        logits."""
        rlhf, arch, element = self.rlhf, self.rlhf.actor, self.element
        cache = 2.0 * rows * rlhf.sequence_length * arch.kv_size * element / group
        prefill = rows * rlhf.prompt_tokens * element * (4 * arch.hidden_size + arch.ffn_size / group)
        logits = rows * arch.vocab_size * (rlhf.prompt_tokens * element / group + 3 * 8)
        return arch.num_layers * cache + max(cache, prefill + logits)

    def _score_bytes(self, rows: int) -> float:
        """Return the bytes of the reference's logits, widened, and of their logarithms."""
        tokens = min(SCORED_ROWS, rows) * self.rlhf.sequence_length
        return float(tokens * self.rlhf.reference.vocab_size * (self.element + 2 * max(4, self.element)))

    # Seconds --------------------------------------------------------------------------------------------------------

    def _switch_s(self, layout: Layout, copy: int) -> float:
        """Return the seconds of gathering the actor's weights for generation, each GPU its part of a tensor group's."""
        size = layout.choice.num_gpus
        if not copy or size == 1:
            return 0.0
        roof = self.problems["actor"].roof
        return half_s(roof.links.ring(size, 1, size), copy, messages=self.rlhf.actor.num_layers)

    def _generation_s(self, layout: Layout) -> dict[str, float]:
        """Return the seconds of prefill and decoding. A token of all rows reads every weight and all of the cache once: it takes
        as long as that, or as the products, or as the host needs to issue them."""
        rlhf, arch, roof, element = self.rlhf, self.rlhf.actor, self.problems["actor"].roof, self.element
        group, rows = layout.generation, layout.rows
        writers = max(1, layout.choice.num_gpus // group)
        waves = -(-rlhf.rollouts // (writers * rows))
        prefill = _forward_s(roof, arch, rows * rlhf.prompt_tokens, rlhf.prompt_tokens, group)
        cache = 2.0 * arch.num_layers * rows * arch.kv_size * element / group
        mean_length = rlhf.prompt_tokens + rlhf.response_tokens / 2
        read_s = (self.num_actor * element / group + cache * mean_length) / roof.bandwidth
        products_s = 2.0 * self.num_actor * rows / group / (roof.peak * roof.constants.matmul)
        launch_s = arch.num_layers * roof.constants.layer_launch_s
        token_s = (max(read_s, products_s) ** 3 + launch_s**3) ** (1 / 3)
        if group > 1:
            ring = roof.links.ring(group, 1, layout.choice.num_gpus)
            sums = 2 * arch.num_layers
            token_s += all_reduce_s(ring, sums * rows * arch.hidden_size * element, messages=sums)
        return {"prefill": waves * prefill, "decode": waves * rlhf.response_tokens * token_s}

    def _score_s(self, layout: Layout) -> float:
        """Return the seconds of a forward pass of all four models over every response."""
        rlhf, size = self.rlhf, layout.choice.num_gpus
        rows = min(SCORED_ROWS, max(1, -(-rlhf.rollouts // size)))
        times = -(-rlhf.rollouts // (size * rows))
        total = 0.0
        for role in ("actor", "critic", "reference", "reward"):
            arch = getattr(rlhf, role)
            forward = _forward_s(self._roof(role), arch, rows * rlhf.sequence_length, rlhf.sequence_length, 1)
            dealt = layout.choice.zero == 3 if role in ("actor", "critic") else layout.frozen in ("sharded", "host")
            gathered = 0.0
            if dealt and size > 1:
                ring = self.problems["actor"].roof.links.ring(size, 1, size)
                gathered = half_s(ring, num_parameters(arch) * self.element, messages=arch.num_layers)
            if layout.frozen == "host" and role in ("reference", "reward"):
                gathered += num_parameters(arch) * self.element / size / host_bytes_per_s(self.cluster, TIME)
            total += times * max(forward, gathered)
        return total

    def _roof(self, role: str) -> Roofline:
        """Return what an accelerator does for a model that only runs forward."""
        task = "reward" if role in ("critic", "reward") else "pretrain"
        return roofline(workload(getattr(self.rlhf, role), task=task), self.cluster, self.precision)

    def _roles(self, layout: Layout, actor: int, critic: int, frozen: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
        rlhf, choice = self.rlhf, layout.choice
        how = f"tensor {choice.tensor} x data {choice.data}, ZeRO {choice.zero}"
        named = {role: getattr(rlhf, role).name or getattr(rlhf, role).family for role in ("actor", "critic", *frozen)}
        away = "device and host" if choice.offload.any else "device"
        found = [
            {"role": role, "model": named[role], "trained": True, "strategy": how, "residence": away, "bytes": size}
            for role, size in (("actor", actor), ("critic", critic))
        ]
        for role, size in frozen.items():
            residence = layout.frozen if self._weights(role) else "shared"
            found.append(
                {
                    "role": role,
                    "model": named[role],
                    "trained": False,
                    "strategy": f"frozen, {residence}",
                    "residence": residence,
                    "bytes": size,
                }
            )
        return tuple(found)


def _forward_s(roof: Roofline, arch: Architecture, tokens: int, length: int, group: int) -> float:
    """Return the seconds of a forward pass of so many tokens."""
    layer = roof.layer(Strategy(), Shape(split=group, whole_split=1), tokens, length).forward_s
    return arch.num_layers * layer + roof.head(tokens, group) / 3


BUILT: Mapping[str, Any] = {"frozen": ("whole",), "generation": 1, "rows": SCORED_ROWS}
"""What `run` does of all this: each GPU writes 16 responses at once, beside whole frozen models."""


def under(rlhf: Rlhf, problem: Problem, strategy: Strategy) -> RlhfPrice:
    """Return a step as `run` carries it out, actor and critic trained under one strategy."""
    recomputed = [stage.num_checkpointed_layers for stage in strategy.stages]
    choice = Choice(
        tensor=strategy.tensor_parallel_degree,
        data=strategy.data_parallel_degree,
        sequence_parallel=strategy.sequence_parallel,
        micro=strategy.micro_batch_size,
        zero=strategy.zero_stage,
        group=strategy.zero_group_size,
        gather=strategy.gather,
        reduce=strategy.reduce,
        offload=strategy.offload,
        recompute=strategy.activation_checkpointing,
        layers=None if recomputed == [stage.num_layers for stage in strategy.stages] else max(recomputed, default=0),
    )
    pricer = Pricer(rlhf, problem.cluster, problem.precision)
    return pricer.price(Layout(choice, "whole", 1, min(SCORED_ROWS, rlhf.rollouts)))


def layouts(pricer: Pricer, pins: Mapping[str, Any]) -> Iterator[Layout]:
    """Yield every layout that is worth a price, less what is pinned: micro batches in powers of four, recompute of everything or
    of nothing, responses in as few waves as memory allows."""
    rlhf, cluster = pricer.rlhf, pricer.cluster
    num_gpus, per_node = cluster.num_gpus, cluster.gpus_per_node
    divides = [
        n for n in range(1, min(num_gpus, per_node) + 1)
        if not (num_gpus % n or per_node % n or rlhf.actor.num_kv_heads % n or rlhf.critic.num_kv_heads % n)
    ]  # fmt: skip
    tensors = [pins["tensor_parallel_degree"]] if "tensor_parallel_degree" in pins else divides
    frozen: tuple[Residence, ...] = pins.get("frozen", ("whole", "sharded", "host"))
    zeros = [pins["zero_stage"]] if "zero_stage" in pins else [0, 1, 3]
    recomputes = [pins["activation_checkpointing"]] if "activation_checkpointing" in pins else ["none", "full"]
    micros = [pins["micro_batch_size"]] if "micro_batch_size" in pins else [1, 4, 16]
    offloads = [pins["offload"]] if "offload" in pins else [Offload(), Offload(optimizer="host")]
    groups = [pins["generation"]] if "generation" in pins else divides
    batch = -(-rlhf.rollouts // rlhf.minibatches)
    for tensor, zero, recompute, micro, offload in product(tensors, zeros, recomputes, micros, offloads):
        data = num_gpus // tensor
        if (zero and data == 1) or micro * data > max(batch, data) or (offload.any and rlhf.lora is not None):
            continue
        choice = Choice(
            tensor=tensor, data=data, zero=zero, group=data if zero else 1, micro=micro, recompute=recompute, offload=offload
        )  # fmt: skip
        if impossible(pricer.problems["actor"].strategy(choice)) is not None:
            continue
        for residence, group in product(frozen, groups):
            rows = max(1, -(-rlhf.rollouts * group // num_gpus))
            for halved in (rows, max(1, rows // 4), max(1, rows // 16), 1) if "rows" not in pins else (pins["rows"],):
                yield Layout(choice, residence, group, halved)


def best(rlhf: Rlhf, cluster: Cluster, *, precision: str = "bf16", pins: Mapping[str, Any] | None = None) -> RlhfPrice:
    """Return the fastest layout that fits; where none does, the one that is over by least. PlanError where pins leave none."""
    pins = pins or {}
    if pins.get("pipeline_parallel_degree", 1) > 1:
        raise PlanError(f"pipeline_parallel_degree {pins['pipeline_parallel_degree']}: {NO_PIPELINE}")
    pricer = Pricer(rlhf, cluster, precision)
    found: RlhfPrice | None = None
    for layout in layouts(pricer, pins):
        price = pricer.price(layout)
        if found is None or _rank(price) < _rank(found):
            found = price
    if found is None:
        raise PlanError(
            f"no layout of {rlhf.actor.name} and its critic has all that is pinned on {cluster.num_gpus} GPUs\n"
            "  to fix: leave a degree out"
        )
    return found


def _rank(price: RlhfPrice) -> tuple[bool, float]:
    return not price.fits, price.step_s if price.fits else float(price.peak_bytes)
