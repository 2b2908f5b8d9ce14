"""torch's two collectives on one flat tensor, under the name that this torch has."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# torch 2.13 renames the two and warns of the old names; 2.11 has the old ones alone.
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
