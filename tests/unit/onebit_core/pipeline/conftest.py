"""What tests of plans share."""

import pytest

from onebit_core.pipeline import training_forecast


@pytest.fixture
def steady(monkeypatch):
    """A machine whose speed does not depend on what else it does: what is computed from the speed can be compared."""
    monkeypatch.setattr(training_forecast, "products_a_second", lambda *_: 1e9)
    monkeypatch.setattr(training_forecast, "bytes_a_second", lambda *_: 1e9)
