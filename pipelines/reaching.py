"""What all that asks a server has in common: its address, patience and key."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from diffdistill.errors import UserError
from diffdistill.pipelines.completions import served_models
from diffdistill.pipelines.json_server import JsonServer

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(kw_only=True)
class Reaching:
    """How a server is asked.

    Attributes:
        timeout: Seconds that it may be silent.
        retries: Further tries after a failure that may be over at the next one.
        backoff: Seconds before the first of them; each further wait is twice as long, up to 30.
        concurrency: Answers that it is asked about at the same time, by each process.
        api_key_variable: Name of the environment variable with its key; null sends none.
    """

    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    concurrency: int = 8
    api_key_variable: str | None = None

    def check_patience(self) -> None:
        """Check the options.

        Raises:
            UserError: If one cannot be.
        """
        for name, fine, bounds in (
            ("timeout", self.timeout > 0, "above 0"),
            ("retries", self.retries >= 0, "at least 0"),
            ("backoff", self.backoff >= 0, "at least 0"),
            ("concurrency", self.concurrency >= 1, "at least 1"),
        ):
            if not fine:
                raise UserError(f"{name} must be {bounds}, not {getattr(self, name)}")

    def reached(self, address: str) -> JsonServer:
        """Return the server at an address.

        Raises:
            UserError: If its key cannot be had.
        """
        return JsonServer(address, self.timeout, self.retries, self.backoff, self._key(address))

    def asked(
        self, ask: Callable[[Question], Answer], questions: Sequence[Question]
    ) -> list[Answer]:
        """Return what ``ask`` says to each question, some at a time; the first error ends all."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(ask, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _key(self, address: str) -> str | None:
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            why = (
                "no key: it has characters that cannot be sent" if key else "not in the environment"
            )
            raise UserError(
                f"the server {address}: api_key_variable names {self.api_key_variable}, which is "
                f"{why}"
            )
        return key


def model_at(server: JsonServer, name: str | None) -> str:
    """Return the name of a server's model, of its only one if none is given.

    Raises:
        UserError: If there is none of that name, or more than one to choose from.
    """
    models = served_models(server)
    if name not in models and (name is not None or len(models) != 1):
        named = "model is not set" if name is None else f"there is no model {name}"
        raise UserError(
            f"the server {server.url}: {named}; it serves {', '.join(models) or 'none'}"
        )
    return models[0] if name is None else name


def is_address(path: str) -> bool:
    """Return whether a path is a web address, and without a name or a key in it."""
    try:
        parts = urlsplit(path)
        _ = parts.port  # refuses what is no number
    except ValueError:
        return False
    known = parts.scheme in ("http", "https") and bool(parts.hostname)
    return known and not any((parts.username, parts.password, parts.query, parts.fragment))
