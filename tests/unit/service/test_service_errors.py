"""Every exception of the service has an HTTP answer."""

import re

import pytest

from service import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_exception_has_a_status_that_fits_its_branch(kind):
    """What the caller can mend is a 4xx, what it cannot is a 5xx."""
    response = errors.response_for(kind("what happened"))
    if issubclass(kind, errors.RequestError):
        assert 400 <= response.status < 500
    else:
        assert 500 <= response.status < 600


def test_the_tree_in_the_docstring_names_every_exception():
    """The drawing is complete and draws nothing that is not there."""
    drawn = set(re.findall(r"(?:├──|└──|^)\s?([A-Z]\w+)", errors.__doc__, flags=re.MULTILINE))
    assert {kind.__name__ for kind in KINDS} == {name for name in drawn if hasattr(errors, name)}


def test_a_kind_without_a_row_answers_as_its_nearest_base():
    """A new exception is answered before anybody writes its row."""

    class PromptTooOdd(errors.ContextTooLong):
        pass

    assert errors.response_for(PromptTooOdd("odd")) == errors.RESPONSES[errors.ContextTooLong]
