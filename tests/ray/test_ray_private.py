"""The private names of Ray that an embedded one needs: this version has them, and one that lacks a name is refused by it."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from orchestrator.control import ray_private

pytestmark = pytest.mark.ray


def test_this_ray_has_all_of_them():
    assert ray_private.missing() is None


@pytest.mark.parametrize("name", ray_private.NAMES, ids=lambda name: f"{name[1]}-{name[2]}")
def test_a_ray_without_one_is_refused_with_the_name_and_the_versions_that_work(name, monkeypatch):
    module, attribute, word = name
    holder = import_module(module)
    *way, last = attribute.split(".")
    for part in way:
        holder = getattr(holder, part)
    if word:
        monkeypatch.setattr(holder, last, lambda self: None)
    else:
        monkeypatch.delattr(holder, last)
    told = ray_private.missing()
    assert f"it lacks {module}.{attribute}" + f" with {word}" * bool(word) in told
    assert "pip install 'ray>=2.52,<2.61'" in told


def test_a_ray_without_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(ray_private, "version", lambda package: "2.51.2")
    assert "Ray 2.51.2 cannot be used: it has no token authentication" in ray_private.missing()


def test_a_ray_that_is_another_package_altogether_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray._private.node", SimpleNamespace())
    assert "it lacks ray._private.node.Node.start_api_server" in ray_private.missing()


def test_the_package_asks_for_the_versions_that_work():
    from importlib.metadata import requires

    assert ray_private.WORKS in [need.replace("<2.61,>=2.52", ">=2.52,<2.61") for need in requires("shardwise")]
