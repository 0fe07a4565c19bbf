"""Fixtures for the tests of the reconcile pass, with the stand-ins of tests/reconcile_world.py."""

import pytest

from tests.reconcile_world import World


@pytest.fixture
def no_sync(monkeypatch):
    """These tests kill processes, not the machine, and syncing takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture
def first(world) -> World:
    """Version 1 serves."""
    return world.serve("1")


@pytest.fixture
def second(first) -> World:
    """Version 2 serves, and version 1 is the last good one."""
    return first.serve("2")
