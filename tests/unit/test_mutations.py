"""Altered checkpoints and tokenizer folders are refused in a sentence and run nothing; `make mutations` plays 1,000 of each."""

from __future__ import annotations

import pickle

from benchmarks import mutations
from benchmarks.mutants import Trap


def test_sixty_mutants_run_nothing_and_show_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answers, faults = mutations.play(30, 7, tmp_path)
    assert faults == []
    assert answers["convert 2"] >= 20
    assert answers["resume refused"] >= 20
    assert answers["convert 0"] >= 5, "a mutant may be whole"


def test_a_trap_is_seen_where_it_is_sprung(tmp_path):
    caught = mutations.Caught()
    caught.active = True
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    caught.active = False
    assert (tmp_path / "sprung").exists()
    assert "pickle.find_class" in caught.events[0]
