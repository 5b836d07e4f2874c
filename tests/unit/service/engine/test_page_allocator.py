"""The page allocator hands out every page once and takes it back once."""

import pytest

from service.engine.page_allocator import NULL_PAGE, PageAllocator


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
    allocator.check_integrity()


def test_usage_is_the_share_in_use():
    """Usage goes from nothing to one."""
    allocator = PageAllocator(4)
    assert allocator.usage == 0
    allocator.allocate(3)
    assert allocator.usage == 0.75
    allocator.allocate(1)
    assert allocator.usage == 1


def test_a_lost_page_is_noticed():
    """The integrity check fails when a page is neither free nor owned."""
    allocator = PageAllocator(4)
    allocator._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        allocator.check_integrity()
