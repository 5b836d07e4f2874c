"""The pool of KV pages: who owns which page. Numbers only; the memory behind them is `kv_cache`'s.

    page 0               the null page: never handed out, never written, always zero. Padding points at it.
    pages 1..num_pages   each either in the free list or in exactly one sequence's page table

    allocate(n)   free list ----> caller, all n or none
    free(pages)   caller -------> free list; a page that is not out is refused, so no page has two owners

The free list is a stack: the page freed last is the warmest in the cache, and is handed out first.
"""

from collections.abc import Iterable

NULL_PAGE = 0


class PageAllocator:
    """Hands out pages 1..num_pages and takes them back."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 1, f"a pool needs at least one page, got {num_pages}"
        self.num_pages = num_pages
        self._free = list(range(num_pages, NULL_PAGE, -1))
        self._in_use: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return len(self._in_use) / self.num_pages

    def allocate(self, count: int) -> list[int] | None:
        """Hand out `count` pages, or none at all (None) when fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._in_use.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Take pages back; the caller must forget them.

        Raises:
            ValueError: a page is not out: freed twice, or never handed out. Nothing has been freed then.
        """
        returned = list(pages)
        strangers = [page for page in returned if page not in self._in_use]
        if strangers or len(set(returned)) != len(returned):
            raise ValueError(f"pages {strangers or returned} are not all out, and cannot be freed")
        self._in_use.difference_update(returned)
        self._free.extend(reversed(returned))

    def check_integrity(self) -> None:
        """Check that free and owned pages make up the pool, each page once.

        Raises:
            AssertionError: a page was lost, or has two owners.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        assert not free & self._in_use, f"pages {sorted(free & self._in_use)} are both free and in use"
        assert free | self._in_use == set(range(1, self.num_pages + 1)), "a page was lost"
