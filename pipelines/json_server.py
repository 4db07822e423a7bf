"""Asking a server in JSON over HTTP: time-outs, retries, and errors in one line without secrets."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from diffdistill.errors import UserError

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be over at the next try."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, at most."""
LONGEST_MESSAGE = 300
TOKENS = re.compile(r"\[[\d,\s]{8,}\]?")  # the message may be cut within them


class Refused(UserError):  # noqa: N818 - says what the server did
    """The server does not do what it was asked, and would not at another try."""


class _PassingError(Exception):
    """A try failed, and another may not."""

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem)
        self.advice = advice


@dataclass(frozen=True)
class JsonServer:
    """A server that is asked in JSON.

    Attributes:
        url: Where its API begins.
        timeout: Seconds that it may be silent.
        retries: Further tries, where one failed that may not fail again.
        backoff: Seconds before the first of them; each further wait is twice as long.
        key: Sent as a bearer token; None sends none.
    """

    url: str
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    key: str | None = field(default=None, repr=False)

    def get(self, path: str) -> Any:
        """Return what is at a path.

        Raises:
            UserError: If the server does not answer, or not in JSON.
        """
        return self._parsed(path, self._tried(path, None))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer to ``body``, sent to a path.

        Raises:
            UserError: If the server does not answer, or not in JSON.
        """
        return self._parsed(path, self._tried(path, json.dumps(body).encode()))

    def tell(self, path: str, body: Mapping[str, Any]) -> None:
        """Send ``body`` to a path, whatever the answer says.

        Raises:
            UserError: If the server does not answer, or refuses.
        """
        self._tried(path, json.dumps(body).encode())

    def _parsed(self, path: str, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise Refused(
                f"the server {self.url}{path} did not answer in JSON: is its API at {self.url}?"
            ) from None

    def _tried(self, path: str, body: bytes | None) -> bytes:
        started = time.monotonic()
        last = _PassingError("")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                return self._asked(path, body)
            except _PassingError as error:
                last = error
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        took = f"{tries} in {time.monotonic() - started:.1f} s"
        raise UserError(f"the server {self.url}{path} {last} ({took}){last.advice}")

    def _asked(self, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = Request(self.url + path, data=body, headers=headers)
        try:
            with build_opener(_Staying).open(request, timeout=self.timeout) as answer:
                text: bytes = answer.read()
        except HTTPError as error:
            raise self._failed(path, error) from None
        except (HTTPException, OSError) as error:
            raise self._unreached(error) from None
        return text

    def _failed(self, path: str, error: HTTPError) -> Exception:
        """Return what to raise of an answer that is an error."""
        try:
            message = self._said(error.read(1 << 16))
        except (HTTPException, OSError):
            message = ""
        told = f"answered HTTP {error.code}: {message or error.reason}"
        if error.code in PASSING:
            return _PassingError(told)
        advice = {
            401: ": set api_key_variable to the environment variable with its key",
            404: f": is its API at {self.url}? most begin with /v1",
        }
        return Refused(f"the server {self.url}{path} {told}{advice.get(error.code, '')}")

    def _unreached(self, error: Exception) -> Exception:
        """Return what to raise of no answer."""
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            return _PassingError(
                f"did not answer within {self.timeout:g} s",
                ": raise timeout, or lower concurrency",
            )
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return _PassingError(
            f"cannot be reached: {why}",
            ": start it, such as by vllm serve MODEL --port 8000, or correct path",
        )

    def _said(self, text: bytes) -> str:
        """Return the message of an error, without the key and without the tokens of a text."""
        shown = text.decode(errors="replace")
        try:
            shown = _message(json.loads(shown))
        except ValueError:
            shown = "" if "<" in shown else shown
        shown = TOKENS.sub("[...]", " ".join(shown.split()))
        if self.key:
            shown = shown.replace(self.key, "***")
        return shown[:LONGEST_MESSAGE]


class _Staying(HTTPRedirectHandler):
    """Takes a redirection as an error: what it leads to is not to be sent the key."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return no request."""


def _message(told: Any) -> str:
    """Return the text of an error in the forms that such servers give it."""
    if isinstance(told, Mapping):
        names = ("error", "message", "detail", "msg")
        return next((_message(told[name]) for name in names if told.get(name)), "")
    if isinstance(told, list):
        return "; ".join(_message(item) for item in told)
    return str(told)
