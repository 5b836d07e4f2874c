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

from service.auth import Caller, KeyRing, Scope
from service.errors import Forbidden
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
            return json.loads((await self.body()).decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise HTTPException(400, "the body is not valid JSON (NaN and Infinity are not JSON)") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


class GuardedRoute(APIRoute):
    """A route that only callers with `needed` may use."""

    needed: ClassVar[Scope]

    def get_route_handler(self) -> Handler:
        """Wrap the route's handler in the check."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            request.state.caller = admit(request, self.needed)
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return guarded


class InferenceRoute(GuardedRoute):
    """For callers who generate text."""

    needed = Scope.INFERENCE


class AdminRoute(GuardedRoute):
    """For operators."""

    needed = Scope.ADMIN


def admit(request: Request, scope: Scope) -> Caller:
    """Authenticate the request's key and check its scope.

    Raises:
        Unauthorized: no key, or an unknown one.
        Forbidden: the key lacks the scope; or no keys are set up and the Host header is not this machine's.
    """
    keys: KeyRing = request.app.state.keys
    if keys.is_open and not is_loopback(_host(request)):
        raise Forbidden("without API keys the server only answers requests addressed to localhost or 127.0.0.1")
    caller = keys.authenticate(_bearer(request))
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
