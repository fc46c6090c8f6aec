"""hypothesis where it is installed; without it the tests that draw their problems from it are skipped."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["HealthCheck", "given", "settings", "st"]

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Takes the place of strategies, which are made when a test module is imported."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    HealthCheck: Any = _Anything()
    st: Any = _Anything()

    def given(*args: Any, **kwargs: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed: pip install 'rnnkit[test]'")

    def settings(*args: Any, **kwargs: Any) -> Any:
        return lambda test: test
