"""The error tree: what `except` clauses of callers rely on."""

import pytest

from afpq import errors

VALUE_ERRORS = ["DataError", "FormatError", "ModelError", "PlanError"]


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_an_afpq_error(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.AfpqError)


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_errors_about_values_are_value_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)


def test_a_missing_library_is_not_a_value_error() -> None:
    assert not issubclass(errors.RuntimeUnavailableError, ValueError)


@pytest.mark.parametrize("name", errors.__all__)
def test_the_docstring_draws_every_error(name: str) -> None:
    assert name in (errors.__doc__ or "")
