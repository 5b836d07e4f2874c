"""Further names of served models. An alias is repointed in one assignment: a request goes to one model or to the other.

load green -> try it by its own name -> repoint the alias from blue to green -> unload blue
"""

from collections.abc import Callable, Iterator

from service.errors import Conflict, NotFound, UnknownModel


class Aliases:
    """Alias to model name.

    Args:
        is_served: whether a model of a name is served or being loaded.
        check_name: raises BadRequest for a name that cannot be one.
        on_change: called after each change.
    """

    def __init__(
        self, is_served: Callable[[str], bool], check_name: Callable[[str], None], on_change: Callable[[], None]
    ) -> None:
        self._is_served = is_served
        self._check_name = check_name
        self._on_change = on_change
        self._targets: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._targets))

    def resolve(self, name: str) -> str:
        """Return the model that a name stands for: itself unless it is an alias."""
        return self._targets.get(name, name)

    def of(self, name: str) -> list[str]:
        """Return the aliases of a model."""
        return [alias for alias, target in self._targets.items() if target == name]

    def targets(self) -> dict[str, str]:
        """Return alias to model, as it is now."""
        return dict(self._targets)

    def point(self, alias: str, name: str) -> None:
        """Set an alias, or let it lead to another model.

        Raises:
            BadRequest: it cannot be a name.
            Conflict: a model of that name is served.
            UnknownModel: the model it should lead to is not served.
        """
        self._check_name(alias)
        if self._is_served(alias):
            raise Conflict(f"{alias!r} is the name of a served model; choose another alias", param="alias")
        if not self._is_served(name):
            hint = f"; {name!r} is an alias of {self._targets[name]!r}" if name in self._targets else ""
            raise UnknownModel(f"no model named {name[:128]!r} is loaded{hint}; load it first", param="model")
        self._targets[alias] = name
        self._on_change()

    def remove(self, alias: str) -> None:
        """Forget an alias.

        Raises:
            NotFound: there is none of that name.
        """
        if alias not in self._targets:
            raise NotFound(f"there is no alias {alias[:128]!r}; known: {', '.join(self._targets) or 'none'}")
        del self._targets[alias]
        self._on_change()
