"""Torch's checkpoint reader without its trust: no pickle but of torch's own metadata classes, no file but the manifest's."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from orchestrator.training.manifest import CheckpointRef, CheckpointRefused


class Reader(FileSystemReader):
    """Torch's reader, without its pickle.load: only metadata classes, only files that the manifest vouches for."""

    def __init__(self, ref: CheckpointRef) -> None:
        super().__init__(ref.path)
        self.name = ref.path.name
        try:
            with open(ref.path / ".metadata", "rb") as file:
                self.metadata = cast("Metadata", MetadataUnpickler(file).load())
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
            raise CheckpointRefused(self.name, str(error)) from None
        for info in self.metadata.storage_data.values():
            if info.relative_path not in ref.manifest["files"]:
                raise CheckpointRefused(self.name, f"its .metadata names a foreign file: {info.relative_path}")
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def refuse_unfit(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Torch would raise in the middle of a collective, on one rank perhaps, and fill what is missing with nothing."""
        held = self.metadata.state_dict_metadata
        if missing := sorted(targets.keys() - held.keys()):
            raise CheckpointRefused(
                self.name, f"it lacks {len(missing)} tensors of this model, {missing[0]} among them"
            )
        for name, tensor in targets.items():
            size = getattr(held[name], "size", None)
            if size != tensor.shape:
                raise CheckpointRefused(
                    self.name, f"its {name} has shape {list(size or ())}, this model's {list(tensor.shape)}"
                )


class MetadataUnpickler(pickle.Unpickler):
    """Reads what FileSystemWriter.finish writes (torch 2.11 to 2.13) and refuses every other class or function."""

    ALLOWED = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "TensorStorageMetadata",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "TensorProperties",
                    "StorageMeta",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint of ours contains")
