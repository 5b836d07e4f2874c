"""Every exception of the service, and the HTTP answer each one becomes.

ServiceError
├── RequestError               the caller can mend it (4xx)
│   ├── BadRequest                 a field is missing, of the wrong type, or impossible
│   │   ├── UnsupportedParameter       a field of OpenAI's that we do not serve
│   │   └── ContextTooLong             prompt and completion do not fit the model's context
│   ├── Unauthorized               no key, or an unknown one
│   ├── Forbidden                  the key lacks the scope
│   ├── NotFound
│   │   ├── UnknownModel               no model of that name is loaded
│   │   └── JobNotFound                no job of that id
│   ├── Conflict                   the thing exists already, or is in the wrong state
│   │   └── DoesNotFit                 there is too little memory for the model
│   ├── PayloadTooLarge            the body is over the limit
│   ├── EngineBusy                 the queue is full; try again later
│   └── RateLimited                the key has used what it may use in a minute
└── ServerFailure              the caller cannot mend it (5xx)
    ├── EngineStartFailed          the engine process could not load the model
    ├── EngineDead                 the engine process died under the request, or is being restarted
    ├── GenerationFailed           this one sequence failed inside the engine (a NaN, a failed step)
    ├── ModelLoading               the model is known but not yet loaded
    ├── JobsUnavailable            jobs are switched off here, or their database does not answer
    └── ShuttingDown               the server drains and takes no new work

`RESPONSES` is the one table from exception to HTTP status and to the `type` and `code` of OpenAI's error
envelope `{"error": {"message", "type", "param", "code"}}`; a class without a row answers as its nearest base. A
message names the thing, the value and the remedy. Nothing here speaks HTTP: `service.api` reads the table.
"""

from dataclasses import dataclass


class ServiceError(Exception):
    """Base of everything the service reports.

    Attributes:
        param: the request field at fault, for OpenAI's `param`; None when no single field is.
        retry_after_seconds: when to try again; None when waiting does not help.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class RequestError(ServiceError):
    """The caller can mend it."""


class BadRequest(RequestError):
    """A field is missing, of the wrong type, or impossible."""


class UnsupportedParameter(BadRequest):
    """A field of OpenAI's that we do not serve, or a value of it."""


class ContextTooLong(BadRequest):
    """Prompt and completion do not fit the model's context."""


class Unauthorized(RequestError):
    """No key was given, or an unknown one."""


class Forbidden(RequestError):
    """The key is known but lacks the scope."""


class NotFound(RequestError):
    """There is no such thing."""


class UnknownModel(NotFound):
    """No model of that name is loaded."""


class JobNotFound(NotFound):
    """There is no job of that id."""


class Conflict(RequestError):
    """The thing exists already, or is in a state that does not allow this."""


class DoesNotFit(Conflict):
    """There is too little memory for the model beside those that are loaded."""


class PayloadTooLarge(RequestError):
    """The body is over the limit."""


class EngineBusy(RequestError):
    """The engine's queue is full; the same request may succeed later."""


class RateLimited(RequestError):
    """The key has used what it may use in a minute."""


class ServerFailure(ServiceError):
    """The caller cannot mend it."""


class EngineStartFailed(ServerFailure):
    """The engine process could not load the model."""


class EngineDead(ServerFailure):
    """The engine process died under the request, or is being restarted."""


class GenerationFailed(ServerFailure):
    """This one sequence failed inside the engine; its neighbours did not."""


class ModelLoading(ServerFailure):
    """The model is known but not yet loaded."""


class JobsUnavailable(ServerFailure):
    """Jobs are switched off on this server, or their database does not answer."""


class ShuttingDown(ServerFailure):
    """The server drains and takes no new work."""


@dataclass(frozen=True, kw_only=True)
class ErrorResponse:
    """How one kind of error answers over HTTP: the status, and OpenAI's `type` and `code`."""

    status: int
    type: str
    code: str | None


RESPONSES: dict[type[ServiceError], ErrorResponse] = {
    BadRequest: ErrorResponse(status=400, type="invalid_request_error", code="invalid_value"),
    UnsupportedParameter: ErrorResponse(status=400, type="invalid_request_error", code="unsupported_parameter"),
    ContextTooLong: ErrorResponse(status=400, type="invalid_request_error", code="context_length_exceeded"),
    Unauthorized: ErrorResponse(status=401, type="authentication_error", code="invalid_api_key"),
    Forbidden: ErrorResponse(status=403, type="permission_error", code="insufficient_permissions"),
    NotFound: ErrorResponse(status=404, type="invalid_request_error", code="not_found"),
    UnknownModel: ErrorResponse(status=404, type="invalid_request_error", code="model_not_found"),
    JobNotFound: ErrorResponse(status=404, type="invalid_request_error", code="job_not_found"),
    Conflict: ErrorResponse(status=409, type="invalid_request_error", code="conflict"),
    DoesNotFit: ErrorResponse(status=409, type="invalid_request_error", code="not_enough_memory"),
    PayloadTooLarge: ErrorResponse(status=413, type="invalid_request_error", code="payload_too_large"),
    EngineBusy: ErrorResponse(status=429, type="rate_limit_error", code="engine_busy"),
    RateLimited: ErrorResponse(status=429, type="rate_limit_error", code="rate_limit_exceeded"),
    EngineStartFailed: ErrorResponse(status=500, type="server_error", code="engine_start_failed"),
    EngineDead: ErrorResponse(status=503, type="server_error", code="engine_dead"),
    GenerationFailed: ErrorResponse(status=500, type="server_error", code="generation_failed"),
    ModelLoading: ErrorResponse(status=503, type="server_error", code="model_loading"),
    JobsUnavailable: ErrorResponse(status=503, type="server_error", code="jobs_unavailable"),
    ShuttingDown: ErrorResponse(status=503, type="server_error", code="shutting_down"),
    RequestError: ErrorResponse(status=400, type="invalid_request_error", code=None),
    ServiceError: ErrorResponse(status=500, type="server_error", code=None),
}


def response_for(error: ServiceError) -> ErrorResponse:
    """Return the row of the nearest class of `error` that has one."""
    return next(RESPONSES[kind] for kind in type(error).__mro__ if kind in RESPONSES)
