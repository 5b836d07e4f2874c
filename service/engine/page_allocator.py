"""The pool of KV pages: who holds which page. Numbers only; the memory behind them is `kv_cache`'s.

    page 0               the null page: never handed out, never written, always zero. Padding points at it.
    pages 1..num_pages   each held by the page tables of one or more sequences, or free

    allocate(n)    free ------> caller, all n or none; blank pages first, then findable ones, the oldest first
    share(pages)   findable --> one more holder
    free(pages)    one holder less; nobody left: free. A page that is not held is refused.

A free page whose content is known to `prefix_cache` stays findable until it is handed out again: eviction costs
nothing before it is needed. Of a table freed whole the last pages are handed out first, because a prefix is of use
without its continuation and not the other way round. Blank pages are a stack: the page freed last is the warmest in
the processor's caches.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import chain

from service.engine.prefix_cache import PrefixCache

NULL_PAGE = 0


class PageAllocator:
    """Hands out pages 1..num_pages and takes them back."""

    def __init__(self, num_pages: int, prefix_cache: PrefixCache | None = None) -> None:
        assert num_pages >= 1, f"a pool needs at least one page, got {num_pages}"
        self.num_pages = num_pages
        self.prefix_cache = PrefixCache() if prefix_cache is None else prefix_cache
        self._blank = list(range(num_pages, NULL_PAGE, -1))
        self._findable: OrderedDict[int, None] = OrderedDict()  # free ones only, in order of their release
        self._num_holders = [0] * (NULL_PAGE + 1 + num_pages)

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now, findable or not."""
        return len(self._blank) + len(self._findable)

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return (self.num_pages - self.num_free) / self.num_pages

    def is_held(self, page: int) -> bool:
        """Whether the page is in somebody's page table."""
        return self._num_holders[page] > 0

    def allocate(self, count: int) -> list[int] | None:
        """Hand out `count` pages, or none at all (None) when fewer are free."""
        if count > self.num_free:
            return None
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._num_holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that were found in the prefix cache."""
        for page in pages:
            if not self._num_holders[page]:
                del self._findable[page]
            self._num_holders[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Take a holder from each page; the caller must forget them.

        Raises:
            ValueError: a page is not held: freed twice, or never handed out. Nothing has been freed then.
        """
        returned = list(pages)
        strangers = [page for page in returned if not (NULL_PAGE < page <= self.num_pages and self.is_held(page))]
        if strangers or len(set(returned)) != len(returned):
            raise ValueError(f"pages {strangers or returned} are not all out, and cannot be freed")
        for page in reversed(returned):
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            if page in self.prefix_cache:
                self._findable[page] = None
            else:
                self._blank.append(page)

    def check_integrity(self, page_tables: Iterable[Iterable[int]] = ()) -> None:
        """Check that free and held pages make up the pool, each page once, and that nothing else is held.

        Args:
            page_tables: of everybody who holds pages.

        Raises:
            AssertionError: a page was lost, is free and held, or has more or fewer holders than tables name it.
        """
        free = [*self._blank, *self._findable]
        assert len(set(free)) == len(free), "a page is twice among the free ones"
        held = {page for page, holders in enumerate(self._num_holders) if holders}
        assert held.isdisjoint(free), f"pages {sorted(held.intersection(free))} are both free and in use"
        assert held.union(free) == set(range(1, self.num_pages + 1)), "a page was lost"
        named = Counter(chain.from_iterable(page_tables))
        wrong = [page for page in held | named.keys() if self._num_holders[page] != named[page]]
        assert not wrong, f"pages {sorted(wrong)} have other holders than the page tables say"
        assert all(page in self.prefix_cache for page in self._findable), "a page kept to be found cannot be found"
        assert not any(page in self.prefix_cache for page in self._blank), "a blank page can be found"

    def _evict(self) -> int:
        """Take the findable page that was released first, and let it be found no more."""
        page, _ = self._findable.popitem(last=False)
        self.prefix_cache.forget(page)
        return page
