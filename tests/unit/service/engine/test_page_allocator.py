"""The page allocator hands out every page once, takes it back from its last holder, and gives up what is known last."""

import pytest

from service.engine.page_allocator import NULL_PAGE, PageAllocator
from service.engine.prefix_cache import PageKey


def test_every_page_is_handed_out_once_and_never_the_null_page():
    """All pages of the pool can be had, each once, and page 0 is not among them."""
    allocator = PageAllocator(5)
    pages = allocator.allocate(3) + allocator.allocate(2)
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert NULL_PAGE not in pages


def test_too_large_a_demand_takes_nothing():
    """An allocation that cannot be met whole leaves the pool as it was."""
    allocator = PageAllocator(4)
    allocator.allocate(2)
    assert allocator.allocate(3) is None
    assert allocator.num_free == 2


def test_the_page_freed_last_is_handed_out_first():
    """The warmest page comes first."""
    allocator = PageAllocator(4)
    first, second = allocator.allocate(2)
    allocator.free([first, second])
    assert allocator.allocate(1) == [first]


@pytest.mark.parametrize("pages", [[1, 1], [4], [NULL_PAGE], [1, 9]])
def test_a_page_that_is_not_out_cannot_be_freed(pages):
    """A double free, a page never handed out or the null page is refused, and frees nothing."""
    allocator = PageAllocator(4)
    assert allocator.allocate(3) == [1, 2, 3]
    with pytest.raises(ValueError, match="cannot be freed"):
        allocator.free(pages)
    assert allocator.num_free == 1
    allocator.check_integrity([[1, 2, 3]])


def test_usage_is_the_share_in_use():
    """Usage goes from nothing to one."""
    allocator = PageAllocator(4)
    assert allocator.usage == 0
    allocator.allocate(3)
    assert allocator.usage == 0.75
    allocator.allocate(1)
    assert allocator.usage == 1


def findable_page(allocator, name):
    """Take a page, let it be found by a name, and give it back; returns page and key."""
    key = PageKey(b"", name)
    [page] = allocator.allocate(1)
    allocator.prefix_cache.keep(page, key)
    allocator.free([page])
    return page, key


def test_a_known_page_is_found_until_it_is_handed_out_again():
    """Freeing forgets nothing; taking the page for something else does."""
    allocator = PageAllocator(1)
    page, key = findable_page(allocator, b"known")
    assert allocator.num_free == 1
    assert allocator.prefix_cache.find([key]) == [page]
    assert allocator.allocate(1) == [page]
    assert allocator.prefix_cache.find([key]) == []


def test_blank_pages_are_handed_out_before_known_ones_and_those_by_age():
    """What nobody can find goes first, then what was released first."""
    allocator = PageAllocator(3)
    first, _ = findable_page(allocator, b"first")
    second, _ = findable_page(allocator, b"second")
    [blank] = {1, 2, 3} - {first, second}
    assert [allocator.allocate(1) for _ in range(3)] == [[blank], [first], [second]]


def test_of_a_table_the_last_page_is_handed_out_first():
    """A prefix is of use without its continuation, so the continuation is given up first."""
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    for position, page in enumerate(pages):
        allocator.prefix_cache.keep(page, PageKey(b"", bytes([position])))
    allocator.free(pages)
    assert allocator.allocate(3) == pages[::-1]


def test_a_shared_page_is_free_when_its_last_holder_has_gone():
    """Every holder gives it back once, and once only."""
    allocator = PageAllocator(2)
    page, _ = findable_page(allocator, b"shared")
    allocator.share([page])
    allocator.share([page])
    allocator.check_integrity([[page], [page]])
    allocator.free([page])
    assert (allocator.num_free, allocator.is_held(page)) == (1, True)
    allocator.free([page])
    assert (allocator.num_free, allocator.is_held(page)) == (2, False)
    with pytest.raises(ValueError, match="cannot be freed"):
        allocator.free([page])
    allocator.check_integrity()


def lose_a_page(allocator):
    allocator._blank.pop()


def free_a_held_page(allocator):
    allocator._blank.append(1)


def count_a_holder_twice(allocator):
    allocator._num_holders[1] = 2


def find_a_blank_page(allocator):
    allocator.prefix_cache.keep(3, PageKey(b"", b"blank"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_page, "lost"),
        (free_a_held_page, "both free and in use"),
        (count_a_holder_twice, r"pages \[1\] have other holders"),
        (find_a_blank_page, "blank page can be found"),
    ],
)
def test_damage_is_noticed(damage, words):
    """The integrity check fails on a lost page, one with two owners, a wrong count, and a page known by mistake."""
    allocator = PageAllocator(4)
    assert allocator.allocate(1) == [1]
    allocator.check_integrity([[1]])
    damage(allocator)
    with pytest.raises(AssertionError, match=words):
        allocator.check_integrity([[1]])
