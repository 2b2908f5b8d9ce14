"""Seconds of one layer and of the head on one accelerator: products by an efficiency curve over their shape, attention,
element-wise work by bytes, kernel launches. Measured curves replace the GPU's constants on a calibrated cluster.

Sources: roofline (Williams 2009); tile and wave quantization as in NVIDIA's matrix multiplication guide (tiles of 128 x 256,
one a multiprocessor); the constants are strategies/constants.py's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from clusters.cluster import Cluster
from strategies.constants import SUSTAINED, TIME, TimeConstants
from strategies.links import Links
from strategies.rank import Shape
from strategies.strategy import Strategy
from strategies.workload import Workload

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
"""Bytes of an activation."""
TILE_ROWS, TILE_COLUMNS = 128, 256


class Layer(NamedTuple):
    """Seconds of one layer of one micro batch, without messages."""

    forward_s: float
    backward_s: float
    again_full_s: float
    """Seconds that full checkpointing adds."""
    again_selective_s: float


class Roofline:
    """One model on one accelerator in one precision. Keeps what it has worked out: a search asks again and again."""

    __slots__ = (
        "_heads",
        "_layers",
        "_products",
        "bandwidth",
        "cluster",
        "constants",
        "element",
        "flash",
        "links",
        "memo",
        "peak",
        "precision",
        "work",
    )

    def __init__(self, work: Workload, cluster: Cluster, precision: str, constants: TimeConstants = TIME) -> None:
        self.work, self.cluster, self.constants = work, cluster, constants
        self.precision, self.element = precision, ELEMENT[precision]
        name = cluster.accelerator.name
        generation = "a100" if name.startswith("a800") else "-".join(p for p in name.split("-") if not p.endswith("gb"))
        sustained, flash = SUSTAINED.get(generation, SUSTAINED["other"])
        calibration = cluster.calibration
        dense = cluster.accelerator.peak_flops[precision]
        measured = calibration.matmul_flops.get(precision) if calibration else None
        self.peak = measured or dense * sustained
        self.flash = dense * flash * (constants.flash_own if work.native else constants.flash)
        measured = calibration.memory_bytes_per_s if calibration else None
        self.bandwidth = measured or cluster.accelerator.memory_bytes_per_s * constants.memory
        self._layers: dict[tuple[int, int, int, int, str, bool, bool], Layer] = {}
        self._heads: dict[tuple[int, int], float] = {}
        self.links = Links(cluster, constants)
        self.memo: dict[tuple[object, ...], Any] = {}
        """Answers that were worked out for a door, under the fields that it declares (step_time.py)."""
        half_size = constants.matmul_half_size * math.sqrt(dense / 312e12)
        self._products = (self.peak * constants.matmul, half_size, cluster.accelerator.num_multiprocessors)

    @property
    def wait_s(self) -> float:
        """Return the seconds that a blocking collective takes beyond its bytes."""
        cluster = self.cluster
        return self.constants.collective_s if cluster.accelerator.kind == "cuda" else cluster.intra_node.latency_s

    def layer(self, strategy: Strategy, shape: Shape, tokens: int, sequence_length: int) -> Layer:
        """Return the seconds of one layer of one micro batch of `tokens`, each of which attends to `sequence_length` others."""
        key = (tokens, sequence_length, shape.split, shape.whole_split, strategy.attention, *fusions(strategy))
        known = self._layers.get(key)
        if known is None:
            known = self._layers[key] = (_cpu_layer if self.cluster.accelerator.kind == "cpu" else _gpu_layer)(
                self, *key
            )
        return known

    def head(self, tokens: int, tensor: int) -> float:
        """Return the seconds of the output projection and the loss of one micro batch, forward and backward."""
        key = tokens, tensor
        known = self._heads.get(key)
        if known is None:
            work = self.work
            columns = work.num_outputs / tensor
            if self.cluster.accelerator.kind == "cpu":
                known = _cpu_head(self, tokens)
            else:
                product = self.product_s(tokens, work.embedding_size, columns)
                known = (
                    3 if work.trained is None else 2
                ) * product + self.constants.logit_bytes * tokens * columns / self.bandwidth
            self._heads[key] = known
        return known

    def product_s(self, rows: float, inputs: float, outputs: float) -> float:
        """One product on a GPU: 2 r k n FLOPs at peak * s / (s + half size), s the cube root of r k n, in whole waves."""
        peak, half_size, multiprocessors = self._products
        volume = rows * inputs * outputs
        waste = 1.0
        if multiprocessors:
            tiles = -(-rows // TILE_ROWS) * -(-outputs // TILE_COLUMNS)
            waste = -(-tiles // multiprocessors) * multiprocessors / tiles
        return 2.0 * volume * (1 + half_size / float(volume ** (1 / 3))) * waste / peak

    def rate(self, curve: str, size: float, otherwise: float) -> float:
        """A measured rate, or the one number where the curve was not measured."""
        calibration = self.cluster.calibration
        return (calibration.rate(curve, size) if calibration else None) or otherwise


def _gpu_layer(
    roof: Roofline,
    tokens: int,
    sequence_length: int,
    tensor: int,
    whole_split: int,
    attention: str,
    fused_norm: bool,
    compiled: bool,
) -> Layer:
    work, constants = roof.work, roof.constants
    products = _products_s(roof, work, tokens, tensor)
    # A product's backward pass is two of its size; a frozen one's is one: its weights have no gradient.
    products_back = 2 * products
    if work.trained is not None:
        adapters = _products_s(roof, work.trained, tokens, tensor)
        products, products_back = products + adapters, products + 2 * adapters
    scores = tokens * sequence_length * work.num_heads / tensor
    flops = 4.0 * scores * work.head_dim
    flash = attention == "flash" and not work.attention_bias
    if flash:  # half of the square is masked and skipped, unless a mask is given
        whole_s = flops / (roof.flash * _flash_part(constants, sequence_length, work.head_dim))
        attend = whole_s if work.takes_masks else whole_s / 2
        attend_back = constants.flash_backward * attend
    else:
        # Tensor cores want rows of whole 16 bytes: BLOOM's trials with heads of 108 ran a third slower than with 96 or 144.
        aligned = 1.0 if work.head_dim % 8 == 0 else constants.misaligned_head
        passes = constants.score_bytes * (constants.math_passes if attention == "math" else 1.0) * roof.element / 2
        attend = flops / (roof.peak * constants.score_products * aligned) + passes * scores / roof.bandwidth
        attend_back = 2 * attend
    unfused = work.unfused_norm_elements if not (fused_norm or compiled) and roof.element == 2 else 0
    whole = (work.traffic_whole_elements + unfused) / whole_split
    traffic = tokens * (whole + work.traffic_split_elements / tensor) * roof.element / roof.bandwidth
    floor = constants.layer_launch_s * (constants.unfused_launches if unfused else 1.0)
    if compiled:
        traffic, floor = traffic * constants.compiled_traffic, floor * constants.compiled_launches
    forward = _rounded_max(products + attend + traffic, floor)
    backward = _rounded_max(products_back + attend_back + 2 * traffic, 2 * floor)
    return Layer(forward, backward, forward, traffic + (0.0 if flash else attend))


def _products_s(roof: Roofline, work: Workload, tokens: int, tensor: int) -> float:
    """Return the seconds of a block's products on a GPU, forward."""
    seconds = 0.0
    for matmul in work.matmuls:
        inputs = matmul.inputs / (tensor if matmul.split == "row" else 1)
        outputs = matmul.outputs / (tensor if matmul.split == "column" else 1)
        seconds += matmul.count * roof.product_s(tokens, inputs, outputs)
    return seconds


def fusions(strategy: Strategy) -> tuple[bool, bool]:
    """Return (norms are one kernel, element-wise chains are one kernel)."""
    return strategy.fused_norm, strategy.compile


WIDE_HEAD = 128
"""Size of the heads with which kernels' rates are published."""


def _flash_part(constants: TimeConstants, sequence_length: int, head_dim: int) -> float:
    """Return the part of flash attention's rate at long sequences and wide heads that shorter and narrower ones reach."""
    length = sequence_length / (sequence_length + constants.flash_half_length)
    half = constants.flash_half_head
    narrow = min(head_dim, WIDE_HEAD)
    return length * narrow / (narrow + half) * (WIDE_HEAD + half) / WIDE_HEAD


def _rounded_max(seconds: float, floor: float) -> float:
    """The larger, with the corner rounded: kernels of one layer are partly long and partly short."""
    return float((seconds**3 + floor**3) ** (1 / 3))


def _cpu_layer(
    roof: Roofline,
    tokens: int,
    sequence_length: int,
    tensor: int,
    whole_split: int,
    attention: str,
    fused_norm: bool,
    compiled: bool,
) -> Layer:
    """Measured curves give forward and backward together; a third of them is forward."""
    work, element = roof.work, roof.element
    precision = {2: "bf16", 4: "fp32", 8: "fp64"}[element]
    forward_products = _cpu_products_s(roof, work, tokens, tensor, precision)
    products_back = 2 * forward_products
    if work.trained is not None:  # frozen weights have no gradient
        adapters = _cpu_products_s(roof, work.trained, tokens, tensor, precision)
        forward_products, products_back = forward_products + adapters, forward_products + 2 * adapters
    scores = tokens * sequence_length * work.num_heads / tensor
    slow = roof.rate("matmul_fp32", tokens * work.head_dim * work.head_dim, roof.peak)
    calibration = roof.cluster.calibration
    moved = (calibration.elementwise_bytes_per_s if calibration else None) or roof.bandwidth
    rate = roof.rate("elementwise", tokens * work.hidden_size * element, moved)
    if attention == "flash" and not work.attention_bias:
        attend = 6.0 * scores * work.head_dim / roof.rate(f"attention_{precision}", sequence_length, slow)
    else:
        attend = 12.0 * scores * work.head_dim / slow + 3 * 4 * 2 * scores * element / rate
    whole = work.traffic_whole_elements / whole_split
    traffic = tokens * (whole + work.traffic_split_elements / tensor) * element / rate
    launches = work.num_kernels * ((calibration.op_overhead_s if calibration else None) or 0.0)
    gradients = roof.constants.cpu_gradient_passes * work.trains.block_parameters / tensor * element / roof.bandwidth
    forward = forward_products + attend / 3 + traffic + launches
    backward = products_back + 2 * attend / 3 + 2 * traffic + 2 * launches + gradients
    return Layer(forward, backward, forward, traffic + launches)


def _cpu_products_s(roof: Roofline, work: Workload, tokens: int, tensor: int, precision: str) -> float:
    """Return the seconds of a block's products on a CPU, forward."""
    seconds = 0.0
    for matmul in work.matmuls:
        volume = tokens * matmul.inputs * matmul.outputs / (1 if matmul.split == "whole" else tensor)
        seconds += matmul.count * 2 * volume / roof.rate(f"matmul_{precision}", volume, roof.peak)
    return seconds


def _cpu_head(roof: Roofline, tokens: int) -> float:
    work, element = roof.work, roof.element
    precision = {2: "bf16", 4: "fp32", 8: "fp64"}[element]
    volume = tokens * work.embedding_size * work.num_outputs
    logits = tokens * work.num_outputs
    trains = work.trained is None
    product = (6 if trains else 4) * volume / roof.rate(f"matmul_{precision}", volume, roof.peak)
    constants = roof.constants
    # Tied: from both its uses.
    table = trains * 2 * constants.cpu_gradient_passes * work.vocab_size * work.embedding_size * element
    return product + (logits * constants.cpu_logit_bytes * max(1.0, element / 4) + table) / roof.bandwidth


_KNOWN: dict[tuple[int, int, str, int], Roofline] = {}
_MOST_KNOWN = 512


def roofline(work: Workload, cluster: Cluster, precision: str, constants: TimeConstants = TIME) -> Roofline:
    """Cached by identity: a search prices one model on one cluster a hundred thousand times."""
    key = id(work), id(cluster), precision, id(constants)
    known = _KNOWN.get(key)
    if known is None or known.work is not work or known.cluster is not cluster or known.constants is not constants:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = Roofline(work, cluster, precision, constants)
    return known
