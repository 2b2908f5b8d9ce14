"""Makes one worker of a run stop or stall at a given place; Python imports this file by itself where PYTHONPATH leads here.

The environment variable STUCK says how, as JSON: {"at": forward | collective | checkpoint | data, "rank": 1 or null for all,
"step": 12, "how": stop (SIGSTOP) | stall (a call that takes "seconds"), "flag": "FILE", which marks that it was done}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

STUCK = json.loads(os.environ.get("STUCK", "{}"))


def for_the_first_time():
    try:
        os.close(os.open(f"{STUCK['flag']}-{STUCK['mine']}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def get_stuck():
    if STUCK["how"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(STUCK.get("seconds", 3600.0))


def before(owner, name, act):
    """Replaces a function by one that acts first."""
    plain = getattr(owner, name)

    def changed(*arguments, **settings):
        act(*arguments, **settings)
        return plain(*arguments, **settings)

    setattr(owner, name, changed)


def arrange(loop):
    """Changes the training code of this process; `loop` is the module orchestrator.training.loop."""
    import torch.distributed as dist

    from orchestrator.models.decoder import Block
    from orchestrator.training.data import TokenDataset

    now = {"step": 0}

    def on_step(self, batch):
        now["step"] = batch.step
        STUCK["mine"] = self.world.rank

    def if_due(*_, **__):
        mine = STUCK.get("mine")
        due = now["step"] >= STUCK["step"] and mine is not None and STUCK["rank"] in (None, mine)
        if due and for_the_first_time():
            get_stuck()

    def in_a_collective(self, *flags):
        """The others' part is on its way; this rank's own never comes to its end."""
        if now["step"] == STUCK["step"] and STUCK["rank"] in (None, self.rank) and for_the_first_time():
            import torch

            dist.all_reduce(torch.zeros(len(flags), dtype=torch.int64), group=self.decisions, async_op=True)
            get_stuck()

    before(loop.Loop, "_step", on_step)
    match STUCK["at"]:
        case "forward":
            before(Block, "forward", if_due)
        case "data":
            before(TokenDataset, "sequences", if_due)
        case "checkpoint":
            before(os, "fsync", if_due)  # of a shard: no rank but the first writes anything else
        case "collective":
            before(loop.Groups, "any", in_a_collective)


class Arranger(MetaPathFinder, Loader):
    """Lets the loop's module be loaded as ever, and changes it then."""

    def find_spec(self, name, path=None, target=None):
        if name != "orchestrator.training.loop":
            return None
        spec = PathFinder.find_spec(name, path, target)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            arrange(module)

        spec.loader.exec_module = exec_module
        return spec


if STUCK:
    sys.meta_path.insert(0, Arranger())
