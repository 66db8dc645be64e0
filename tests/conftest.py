"""No test may reach what the person running the tests has: the list of what sparkproof made, and its locks."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`uninstall` removes what the manifest lists: under test that must never be the developer's own."""
    state = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("SPARKPROOF_MANIFEST", str(state / "manifest.jsonl"))
    monkeypatch.setenv("SPARKPROOF_LOCK_DIR", str(state / "locks"))
