"""Routes that ask for a key before they read a byte of the body.

A FastAPI dependency runs after the body was received and parsed, so a stranger could make the server parse megabytes.
A route class runs before. And since the guard sits on the route itself, not on a path prefix, no spelling of a path
leads around it; a test walks all routes and finds each either guarded or on the public list.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from service.api.audit import audited
from service.auth import Caller, KeyRing, Scope
from service.errors import Forbidden
from service.rate_limits import RateLimits
from service.settings import is_loopback

BEARER = HTTPBearer(auto_error=False, description="An API key made with `onebit-serve keys add`.")
"""Declares the key in OpenAPI; the check itself is GuardedRoute's."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictJsonRequest(Request):
    """Reads JSON as the standard defines it: no NaN, no Infinity, UTF-8 only."""

    async def json(self) -> Any:
        """Parse the body.

        Raises:
            HTTPException: it is not JSON; status 400.
        """
        try:
            text = (await self.body()).decode("utf-8")
            self.state.sent = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
        except DoubledName:
            raise HTTPException(400, "the body has an object that names a member twice") from None
        except (ValueError, RecursionError):
            raise HTTPException(400, "the body is not valid JSON (NaN and Infinity are not JSON)") from None
        return self.state.sent


class DoubledName(ValueError):
    """An object names a member twice; readers differ on which one counts, so a proxy may have checked the other."""


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise DoubledName
    return made


class GuardedRoute(APIRoute):
    """A route that only callers with `needed` may use."""

    needed: ClassVar[Scope]

    def get_route_handler(self) -> Handler:
        """Wrap the route's handler in the check."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            self.check_port(request)
            request.state.caller = caller = admit(request, self.needed)
            self.charge(request, caller)
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return guarded

    def check_port(self, request: Request) -> None:
        """Refuse a request that came in by a port where this route is not."""

    def charge(self, request: Request, caller: Caller) -> None:
        """Charge the caller for the request."""


class InferenceRoute(GuardedRoute):
    """For callers who generate text; each request counts against the key's rate."""

    needed = Scope.INFERENCE

    def charge(self, request: Request, caller: Caller) -> None:
        """Charge one request.

        Raises:
            RateLimited: the key has sent its requests of this minute.
        """
        limits: RateLimits = request.app.state.rate_limits
        request.state.allowance = allowance = limits.of(caller.id, caller.rates)
        if allowance is not None:
            allowance.take_request()


class AdminRoute(GuardedRoute):
    """For operators; what they do is written down. Where they have a port of their own, there alone."""

    needed = Scope.ADMIN

    def check_port(self, request: Request) -> None:
        """Compare the port of the socket that took the connection, which no header can change.

        Raises:
            HTTPException: it is another; status 404, as for any path that is not there.
        """
        admin_port = request.app.state.admin_port
        if admin_port is not None and (request.scope.get("server") or (None, None))[1] != admin_port:
            raise HTTPException(404)

    def get_route_handler(self) -> Handler:
        """Wrap the check and the route's handler in the audit log."""
        return audited(super().get_route_handler())


def admit(request: Request, scope: Scope) -> Caller:
    """Authenticate the request's key and check its scope.

    Raises:
        Unauthorized: no key, or an unknown one.
        Forbidden: the key lacks the scope; or no keys are set up and the Host header is not this machine's.
    """
    keys: KeyRing = request.app.state.keys
    if keys.is_open and not is_loopback(_host(request)):
        raise Forbidden("without API keys the server only answers requests addressed to localhost or 127.0.0.1")
    caller = request.state.caller = keys.authenticate(_bearer(request))
    caller.require(scope)
    return caller


def _bearer(request: Request) -> str | None:
    """The key in the Authorization header; a key anywhere else does not count."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def _host(request: Request) -> str:
    """The Host header without its port."""
    host = request.headers.get("host", "")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
