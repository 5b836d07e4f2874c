"""A page is found by all tokens up to its end and the salt, and by nothing less."""

import pytest

from service.engine.prefix_cache import PrefixCache, extend_keys

PAGE_SIZE = 4


def keys_of(tokens, *, salt="", count=None):
    keys = []
    extend_keys(
        keys, tokens, count=len(tokens) // PAGE_SIZE if count is None else count, page_size=PAGE_SIZE, salt=salt
    )
    return keys


def cache_of(keys):
    """Return a cache that knows these keys as pages 1, 2, 3, ..."""
    cache = PrefixCache()
    for page, key in enumerate(keys, start=1):
        cache.keep(page, key)
    return cache


def test_a_common_prefix_is_found_as_far_as_it_goes():
    """Two full pages are common, the third differs in its last token."""
    cache = cache_of(keys_of(range(12)))
    assert cache.find(keys_of([*range(11), 99])) == [1, 2]


def test_equal_tokens_after_another_beginning_are_other_keys():
    """Keys depend on everything before them, so a page is not found by its own tokens alone."""
    cache = cache_of(keys_of([0, 0, 0, 0, 1, 2, 3, 4]))
    assert cache.find(keys_of([9, 9, 9, 9, 1, 2, 3, 4])) == []
    assert cache.find(keys_of([0, 0, 0, 0, 1, 2, 3, 4])) == [1, 2]


@pytest.mark.parametrize("salt", ["", "a", "ab", "\ud800"])
def test_another_salt_finds_nothing(salt):
    """The salt is part of every key, whatever characters it has."""
    cache = cache_of(keys_of(range(8), salt=salt))
    assert cache.find(keys_of(range(8), salt=salt)) == [1, 2]
    assert cache.find(keys_of(range(8), salt=salt + "x")) == []


def test_a_gap_ends_the_search():
    """A page whose predecessor is forgotten is of no use, and is found again when the predecessor is."""
    keys = keys_of(range(12))
    cache = cache_of(keys)
    cache.forget(2)
    assert cache.find(keys) == [1]
    cache.keep(7, keys[1])
    assert cache.find(keys) == [1, 7, 3]


def test_the_first_of_two_equal_pages_is_the_one_found():
    """Two sequences may compute the same at once; the second page stays unknown and can be forgotten."""
    keys = keys_of(range(4))
    cache = cache_of(keys)
    cache.keep(2, keys[0])
    assert (cache.find(keys), 2 in cache) == ([1], False)
    cache.forget(2)
    assert cache.find(keys) == [1]


def test_keys_grow_with_the_sequence():
    """Keys made a page at a time are those made at once, and only full pages have one."""
    tokens = list(range(14))
    grown = []
    for count in (1, 1, 2, 3):
        extend_keys(grown, tokens, count=count, page_size=PAGE_SIZE, salt="s")
    assert grown == keys_of(tokens, salt="s")
    assert len(grown) == 3


def test_an_equal_digest_alone_finds_nothing():
    """Tokens are compared besides the hash: a key with the same digest before it and other tokens is another key."""
    [first, second] = keys_of(range(8))
    assert cache_of([first, second]).find([first, second._replace(tokens=first.tokens)]) == [1]
