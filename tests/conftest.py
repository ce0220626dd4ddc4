"""The tests in this folder use the fixtures of the specification."""

from test_smoke import cache, tiny  # noqa: F401
