"""Bounds within each other multiply; bounds side by side do not."""

import pytest

from service.engine.repetition import largest_repetition


@pytest.mark.parametrize(
    ("expression", "product"),
    [
        ("abc", 1),
        ("", 1),
        ("a{3}", 3),
        ("a{3,5}b{2,4}", 5),
        ("a{7,}", 7),
        ("(a{3,5}){2,4}", 20),
        ("((.{0,100}){0,100}){0,100}", 1_000_000),
        ("(a{3}b|c{4})*", 4),
        ("((a{5})*){6}", 30),
        ("[0-9a-f]{8}-[0-9a-f]{4}", 8),
        ("\\{9\\}", 1),
        ("[(]{3}(\\({2})", 3),
        ("a)){4}", 4),
        ('root ::= ("(" x{2}){3}', 6),
    ],
)
def test_the_largest_product(expression, product):
    """What stands in a class, a string or behind a backslash is no group and no bound."""
    assert largest_repetition(expression) == product
