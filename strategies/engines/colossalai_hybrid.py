"""Tensor and pipeline parallelism on ColossalAI: HybridParallelPlugin, with ZeRO 0 or 1 over the replicas.

Shardformer splits the modules that it knows, Hugging Face's: the project's module brings their configuration and the names of
its parameters there (Decoder.hugging_face), and every rank builds the whole of one in host memory before it is split.

B micro batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.engines.colossalai_boosted import BoosterRunner, LowLevelZero
from strategies.engines.engine import Build, Layout, MicroBatch
from strategies.engines.held import Place
from strategies.engines.installed import engine_module
from strategies.pipeline.runner import none_told
from strategies.strategy import Strategy
from strategies.zero.states import Shard, Weights


class HybridRunner(BoosterRunner):
    """One replica's micro batches, through ColossalAI's 1F1B where there are stages."""

    states: Hybrid

    def _logits(self, batch: MicroBatch) -> Tensor:
        logits_BSV: Tensor = self.build.module(**self._inputs([batch])).logits
        return logits_BSV

    def train(self, micro_batches: Sequence[MicroBatch], factor: float) -> Tensor:
        if self.states.num_stages == 1:
            return super().train(micro_batches, factor)
        losses: list[Tensor] = []
        # The schedule divides each loss by the number of micro batches.
        factor *= len(micro_batches)
        self.states.booster.execute_pipeline(
            iter([self._inputs(micro_batches)]),
            self.build.module,
            self._criterion(micro_batches, factor, losses),
            self.states.optimizer,
            return_loss=False,
        )
        return self._sum(losses)

    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        if self.states.num_stages == 1:
            return super().evaluate(batch)
        losses: list[Tensor] = []
        scheduler = self.states.plugin.scheduler
        kept = dict(scheduler.__dict__)  # a pass without backward leaves its own count of micro batches behind
        scheduler.num_microbatches = None
        with torch.no_grad():
            scheduler.forward_backward_step(
                self.build.module, iter([self._inputs([batch])]), self._criterion([batch], 1.0, losses)
            )
        scheduler.__dict__.update(kept)
        return self._sum(losses) if losses else None

    def _criterion(self, micro_batches: Sequence[MicroBatch], factor: float, losses: list[Tensor]) -> Any:
        """Called on the last stage, once for each micro batch in order."""
        waiting = iter(micro_batches)

        def criterion(output: Any, _: Any) -> Tensor:
            told_K, trained = self.loss(self.build.region, output["logits"], next(waiting))
            losses.append(told_K.double())
            return trained * factor

        return criterion

    def _inputs(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """The mask is all ones; the stages behind the first learn the batch's shape from it."""
        if any(batch.inputs for batch in micro_batches):
            raise ValueError(
                "packed samples cannot run on ColossalAI's tensor and pipeline parallelism; set engine: native"
            )
        ids = torch.cat([batch.input_ids_BS for batch in micro_batches]).to(self.build.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _sum(self, losses: list[Tensor]) -> Tensor:
        return torch.stack(losses).sum(0) if losses else none_told(self.build, self.loss)


class Hybrid(LowLevelZero):
    """See Boosted; at ZeRO 1 the pieces are those of LowLevelZero, over the replicas."""

    def __init__(self, build: Build, weights: Weights) -> None:
        strategy = build.strategy
        self.num_stages = strategy.pipeline_parallel_degree
        self.num_replicas_in_world = strategy.data_parallel_degree
        super().__init__(build, weights)
        if strategy.zero_stage == 0:
            self.num_replicas = strategy.data_parallel_degree
        shared = "embed.tokens.weight" if self.tied and self.num_stages > 1 else ""
        held_twice = (shared,) if shared in self.parameters else ()
        object.__setattr__(build, "layout", self.layouts)
        object.__setattr__(build, "shared", held_twice)

    def _module(self, weights: Weights) -> nn.Module:
        ours: Any = self.build.module
        config, translate = ours.hugging_face()
        self.tied = bool(config["tie_word_embeddings"])
        _refuse_model(config, self.build.strategy)
        self.shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
        self.translated = {translate(name): name for name in self.shapes}
        if self.tied:
            self.translated["lm_head.weight"] = "embed.tokens.weight"
        transformers = engine_module("colossalai", "transformers")
        # No padding token: its row would get no gradient.
        settings = transformers.OPTConfig(**config, attn_implementation="eager", use_cache=False)
        settings.pad_token_id = None
        no_init = engine_module("colossalai", "transformers.modeling_utils").no_init_weights
        with torch.device("meta"), no_init():
            module: Any = transformers.OPTForCausalLM(settings)
        module.to_empty(device="cpu")
        module.tie_weights()
        with torch.no_grad():
            for theirs, parameter in module.named_parameters():
                name = self.translated[theirs]
                parameter.copy_(weights(name, self.shapes[name]))
        module.train()
        return module  # type: ignore[no-any-return]

    def _named(self) -> dict[str, nn.Parameter]:
        mesh = self.build.mesh
        parameters = {self.translated[theirs]: p for theirs, p in self.module.unwrap().named_parameters()}
        self.layouts = {}
        for name, parameter in parameters.items():
            whole = self.shapes[name]
            split = [dim for dim, (a, b) in enumerate(zip(parameter.shape, whole, strict=True)) if a != b]
            self.layouts[name] = Layout(
                shape=whole,
                dim=split[0] if split else None,
                size=mesh.sizes["tensor"],
                rank=mesh.rank("tensor"),
                partial=False,
            )
        return parameters

    def _plugin(self) -> Any:
        strategy = self.build.strategy
        self.plugin = engine_module("colossalai", "colossalai.booster.plugin").HybridParallelPlugin(
            tp_size=strategy.tensor_parallel_degree,
            pp_size=strategy.pipeline_parallel_degree,
            precision=self.build.precision,
            zero_stage=strategy.zero_stage,
            microbatch_size=strategy.micro_batch_size,
            num_layers_per_stage=[s.num_layers for s in strategy.stages] if self.num_stages > 1 else None,
            # The session scales the loss: ColossalAI's scaler stands at 1.
            initial_scale=1.0,
            min_scale=1.0,
            max_scale=1.0,
            max_norm=0.0,
            broadcast_buffers=False,
            parallel_output=False,
            dp_outside=False,
            make_vocab_size_divisible_by=1,
            zero_bucket_size_in_m=self._bucket_m(),
            overlap_communication=False,  # it wants CUDA's streams, and has not been tried
        )
        return self.plugin

    def _shard(self, stepped: Tensor) -> Shard:
        working = self.optimizer.get_master_to_working_map()[id(stepped)] if self.low else stepped
        name = self.names[working]  # type: ignore[index]
        return self.adam.shard(name, self.shapes[name], stepped.detach(), apart=False)

    def place(self, shard: Shard) -> Place:
        layout = self.layouts[shard.name]
        if self.build.strategy.zero_stage == 0:
            return Place(layout=layout)
        size = -(-self.parameters[shard.name].numel() // self.num_replicas_in_world)
        start = dist.get_rank(self.plugin.dp_group) * size
        return Place(start=start, stop=start + size, layout=layout)

    def tells(self, shard: Shard) -> bool:
        mesh = self.build.mesh
        whole = self.layouts[shard.name].dim is None
        again = self.tied and shard.name == "embed.tokens.weight" and mesh.rank("pipeline") > 0
        replica = self.build.strategy.zero_stage == 0 and dist.get_rank(self.plugin.dp_group) > 0
        return not (again or replica or (whole and mesh.rank("tensor") > 0))

    def micro_batch(self, *, last: bool) -> None:
        if self.num_stages == 1:
            super().micro_batch(last=last)

    def _once_a_step(self) -> bool:
        return True

    def reduce(self) -> None:
        """ColossalAI divided the sum by the replicas."""
        for gradient in self.gradients().values():
            gradient.mul_(self.num_replicas_in_world)

    def gradients(self) -> dict[str, Tensor]:
        if self.build.strategy.zero_stage:
            return super().gradients()
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        self.adam.num_steps.fill_(step)
        if self.build.strategy.zero_stage:
            self._publish()
        elif self.low:
            for shard in self.shards:
                self.parameters[shard.name].copy_(shard.master)

    def _publish_group(self) -> Any:
        return self.plugin.dp_group


def _refuse_model(config: Mapping[str, Any], strategy: Strategy) -> None:
    degree = strategy.tensor_parallel_degree
    for field in ("num_attention_heads", "ffn_dim", "hidden_size"):
        if config[field] % degree:
            raise ValueError(
                f"tensor_parallel_degree {degree} does not divide the model's {field} {config[field]}: ColossalAI cuts evenly; "
                "set another degree, or engine: native"
            )
    if degree > 1 and strategy.pipeline_parallel_degree == 1 and not config["tie_word_embeddings"]:
        raise ValueError(
            f"tensor_parallel_degree {degree} with tied_embeddings false: ColossalAI's Shardformer ties OPT's output to its "
            "embedding whatever the model says; add a pipeline, or set engine: native"
        )
