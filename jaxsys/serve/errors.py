"""What a client of the server did wrong, or may try again, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from parallelism.errors import UserError

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refused(UserError):
    """A call that is answered with an error.

    status: of HTTP. param: the field it is about. code: for programs. retry: seconds after which to try again.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        retry: float | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Those that go with its status."""
        headers = {} if self.retry is None else {"Retry-After": str(max(1, round(self.retry)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
