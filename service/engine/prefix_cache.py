"""Which page already holds the keys and values of which tokens, so that a known prefix is not computed again.

Only full pages are known, and a page is known by everything up to its end, because keys depend on all tokens before
them. That is a chain, one link a page (the idea is vLLM's):

    salt --SHA-256--> root | tokens 0..15 --SHA-256--> link 0 | tokens 16..31 --SHA-256--> link 1 | ...
                      '----- key of page 0             '----- key of page 1 = (link 0, its tokens)

A key is the link before the page and the page's own tokens, both compared in full at every look-up, so two pages can
only be taken for one another if two different prefixes have the same SHA-256: not by accident, and by nobody's art
that is known. The salt separates tenants, who could otherwise find out by timing what others have asked.

A page's life, `page_allocator` holding the lists:

    blank --allocate--> held by a sequence --full and computed: keep--> held, findable --share--> held by several
      ^                                                                       |
      '------ forgotten when it is handed out again, oldest first ------ free, findable

Nothing here is a tensor, and nothing is ever copied: a hit is one more reader of a page. Pages shared or findable are
full, and full pages are never written again.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from hashlib import sha256
from typing import NamedTuple


class PageKey(NamedTuple):
    """What a full page is known by.

    Attributes:
        before: digest of salt and all tokens before the page.
        tokens: the page's own tokens, as bytes.
    """

    before: bytes
    tokens: bytes


def extend_keys(keys: list[PageKey], tokens: ListOf[int], *, count: int, page_size: int, salt: str) -> None:
    """Append the keys of a sequence's next full pages, until there are `count`; those that are there stay."""
    while len(keys) < count:
        before = _digest(keys[-1].before + keys[-1].tokens) if keys else _digest(salt.encode(errors="surrogatepass"))
        first = len(keys) * page_size
        keys.append(PageKey(before, array("q", tokens[first : first + page_size]).tobytes()))


class PrefixCache:
    """Finds pages by key. Knows nothing of who holds them."""

    def __init__(self) -> None:
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    def __contains__(self, page: int) -> bool:
        """Whether the page can be found."""
        return page in self._key_of

    def find(self, keys: Iterable[PageKey]) -> list[int]:
        """Return the pages of the first keys, as far as they are known without a gap."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def keep(self, page: int, key: PageKey) -> None:
        """Let a full page be found; when another page with equal content can be found already, that one stays."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, page: int) -> None:
        """Let a page be found no more; one that could not be found stays so."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]


def _digest(content: bytes) -> bytes:
    return sha256(content).digest()
