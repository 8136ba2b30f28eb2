"""Servers on the fake engine, shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.live_server import LiveServer, fake_command, running


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    """A fake text model, called "fake" and "team/fake"."""
    with running(fake_command(served_model_names=["fake", "team/fake"])) as live:
        yield live


@pytest.fixture(scope="session")
def embedder() -> Iterator[LiveServer]:
    """A fake embedding model."""
    with running(fake_command(engine={"kind": "embed"})) as live:
        yield live


@pytest.fixture(scope="session")
def reranker() -> Iterator[LiveServer]:
    """A fake cross-encoder."""
    with running(fake_command(engine={"kind": "classify", "labels": ["score"]})) as live:
        yield live


@pytest.fixture(scope="session")
def classifier() -> Iterator[LiveServer]:
    """A fake classifier of two classes."""
    with running(fake_command(engine={"kind": "classify", "labels": ["good", "bad"]})) as live:
        yield live
