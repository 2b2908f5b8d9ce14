"""Bytes of live tensor storages by component, on real and on fake tensors.

A dispatch mode sees every storage that an operation makes; a weak reference sees it go. FSDP2 resizes storages instead
of making new ones, so `UntypedStorage.resize_` is watched too. Only storages made while the mode is on, and those it
was told of, are counted: buffers inside a collective's own implementation are not tensors and are not seen.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies.offload.host import place

AWAY = ("host", "nvme")
"""Components that are not on the device: counted apart."""
OF_STATE = ("parameters", "master_weights", "gradients", "optimizer_states", "communication_buffers")


def _storages(value: Any) -> Iterable[torch.UntypedStorage]:
    """Every storage under a tensor: a DTensor's local one, a subclass's inner ones."""
    if not isinstance(value, torch.Tensor):
        return
    if hasattr(value, "_local_tensor"):
        yield from _storages(value._local_tensor)
    elif hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
        for name in value.__tensor_flatten__()[0]:
            yield from _storages(getattr(value, name))
    else:
        # A tensor without storage (functional wrappers) holds no bytes of its own.
        with suppress(NotImplementedError, RuntimeError):
            yield value.untyped_storage()


class LiveBytes(TorchDispatchMode):
    """Counts live bytes while it is on.

        with LiveBytes(session.tensors(), vocab_size=50272) as live:
            session.step(...)
        live.peak_bytes, live.peak   # bytes, and bytes by component at that moment
        live.away_peak["host"]       # what offload put on the host, at its own peak

    Components: those of `OF_STATE` by identity; `logits` by their last dimension; `gathered_parameters` where a storage
    is resized (FSDP2's all-gather output); `activations` what the forward pass made and left; `temporary` the rest.
    """

    def __init__(self, state: Mapping[str, Iterable[torch.Tensor]], *, vocab_size: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab_size = vocab_size
        self.live: dict[str, int] = defaultdict(int)
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        """Phase -> its peak: bytes, and bytes by component."""
        self.away_peak: dict[str, int] = dict.fromkeys(AWAY, 0)
        self._total = 0
        self._stepping: bool | None = None
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}
        self._roles: dict[int, str] = {}
        self._resize = torch.UntypedStorage.resize_
        for component, tensors in state.items():
            for tensor in tensors:
                for storage in _storages(tensor):
                    self._roles[storage._cdata] = component
                    self._add(storage, component)
        self._note_peak()

    def _add(self, storage: torch.UntypedStorage, component: str) -> None:
        key = storage._cdata
        if key in self._known and self._known[key][0]() is not None:
            return
        num_bytes = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), num_bytes, component)
        self._change(component, num_bytes)

    def _forget(self, key: int) -> None:
        _, num_bytes, component = self._known.pop(key, (None, 0, "temporary"))
        self._change(component, -num_bytes)

    def _change(self, component: str, num_bytes: int) -> None:
        self.live[component] += num_bytes
        if component in AWAY:
            self.away_peak[component] = max(self.away_peak[component], self.live[component])
        else:
            self._total += num_bytes

    def _note_peak(self) -> None:
        phase = self._phase()
        known = self.peaks.get(phase)
        if known is None or self._total > known[0]:
            self.peaks[phase] = self._total, {name: size for name, size in self.live.items() if name not in AWAY}

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase][0])

    @property
    def peak_bytes(self) -> int:
        return self.peaks[self.peak_phase][0]

    @property
    def peak(self) -> dict[str, int]:
        return self.peaks[self.peak_phase][1]

    def watch(self, states: Any) -> None:
        """Learns from an engine's states where the optimizer begins; without, it is where gradients are off."""
        begin, reduce = states.begin, states.reduce

        def begun() -> None:
            self._stepping = False
            begin()

        def reduced() -> None:
            reduce()
            self._stepping = True

        self._stepping = False
        states.begin, states.reduce = begun, reduced

    def _phase(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        if self._stepping is None:
            return "forward" if torch.is_grad_enabled() else "optimizer"
        return "optimizer" if self._stepping else "forward"

    def _component(self, tensor: torch.Tensor) -> str:
        if away := place():
            return away
        if self.vocab_size and tensor.dim() >= 2 and tensor.shape[-1] == self.vocab_size:
            return "logits"
        return "activations" if self._phase() == "forward" else "temporary"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                for storage in _storages(leaf):
                    if storage._cdata not in self._known:
                        self._add(storage, self._component(leaf))
        self._note_peak()
        return result

    def __enter__(self) -> Self:
        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            before = storage.nbytes()
            self._resize(storage, size)
            key = storage._cdata
            if key in self._known and before != storage.nbytes():
                reference, num_bytes, component = self._known[key]
                self._change(component, -num_bytes)
                component = component if component in OF_STATE else "gathered_parameters"
                self._known[key] = (reference, storage.nbytes(), component)
                self._change(component, storage.nbytes())
                self._note_peak()
            elif key not in self._known:
                self._add(storage, "gathered_parameters")
                self._note_peak()
            return storage

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
