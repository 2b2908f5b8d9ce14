"""The place of an engine beside torch: a folder of its own, put on the path of the process that uses it and of no other.

`make engine-fairscale` fills `engines/fairscale` below the interpreter's prefix, without a dependency of its own: torch is the
one that the native engine uses, and a process that runs another engine never sees the folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any


def folder_of(engine: str) -> Path:
    return Path(os.environ.get("SHARDWISE_ENGINES") or Path(sys.prefix) / "engines") / engine


def is_installed(engine: str, package: str) -> bool:
    """Without importing it, or putting its folder on the path."""
    return (folder_of(engine) / package).is_dir() or importlib.util.find_spec(package) is not None


def engine_module(engine: str, name: str) -> Any:
    """Imports a module of an engine's package. ValueError that says how to install it."""
    folder = folder_of(engine)
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != engine:
            raise
        raise ValueError(
            f"engine {engine} is not installed: {folder} is not there; run `make engine-{engine}`, or set engine: native"
        ) from None
