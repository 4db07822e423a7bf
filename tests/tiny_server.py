"""A real HTTP server of a tiny causal LM, in the protocols of vLLM, SGLang and OpenAI."""

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor


@dataclass
class Refusal(Exception):  # noqa: N818 - an answer with an error status
    """What is answered in place of what was asked."""

    status: int
    content: Any


def refused(status: int, message: str) -> Refusal:
    """Return an error in the form that vLLM gives it."""
    return Refusal(status, {"error": {"message": message, "code": status}})


@dataclass
class TinyServer:
    """A causal LM behind a server, and what is wrong with it.

    Attributes:
        network: The model.
        tokenizer: Reads and writes its tokens.
        names: Names of the model.
        max_logprobs: Asking for more is refused, as vLLM does.
        fewer: So many log-probabilities are left out at each token.
        replies: Status and content of the next answers; status 0 closes the connection.
        delay: Seconds before each answer.
        meeting: Where requests wait for each other before they are answered.
        value: Given in place of the first log-probability of the last token.
        shift: Added to the ids of the most likely tokens.
        echo: What is echoed in place of what was read.
        texts: Whether tokens are named by their text where that is the protocol's own.
        key: What requests have to bear.
        processed: Whether sampling parameters change log-probabilities.
        defaults: The sampling parameters of a request that says nothing.
        requests: Path, headers and body of each request.
        most: The most requests at the same time.
    """

    network: Any
    tokenizer: Any
    names: Sequence[str] = ("tiny",)
    max_logprobs: int = 20
    fewer: int = 0
    replies: list[tuple[int, Any]] = field(default_factory=list)
    delay: float = 0.0
    meeting: threading.Barrier | None = None
    value: Any = "as it is"
    shift: int = 0
    echo: str | None = None
    texts: bool = False
    key: str | None = None
    processed: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict)
    requests: list[tuple[str, Mapping[str, str], Any]] = field(default_factory=list)
    most: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.busy = 0
        self.lock = threading.Lock()

    @property
    def asked(self) -> list[Any]:
        """Return the bodies of the requests about answers."""
        return [body for _, _, body in self.requests if body and not is_probe(body)]

    def answered(self, path: str, headers: Mapping[str, str], body: Any) -> Any:
        """Return the answer to a request."""
        with self.lock:
            self.requests.append((path, headers, body))
            reply = self.replies.pop(0) if self.replies else None
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            time.sleep(self.delay)
            if self.meeting is not None and body:
                self.meeting.wait()
            if reply is not None:
                raise Refusal(*reply)
            if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
                raise refused(401, "Unauthorized")
            return self.routed(path, body)
        finally:
            with self.lock:
                self.busy -= 1

    def routed(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": name} for name in self.names]}
        if path == "/generate":
            return self.generate(body)
        if path != "/v1/completions":
            raise refused(404, "Not Found")
        if body["model"] not in self.names:
            raise refused(404, f"The model `{body['model']}` does not exist.")
        return self.completion(body)

    def completion(self, body: Any) -> Any:
        tokens = body["prompt"]
        text = (self.echo or self.tokenizer.decode(tokens)) if body.get("echo") else ""
        choice: dict[str, Any] = {"index": 0, "text": text + "!", "finish_reason": "length"}
        if body.get("max_tokens", 1) > 1:
            skipped = body.get("skip_special_tokens", True)
            choice |= self.continued(tokens, body["max_tokens"], skipped=skipped)
        if (count := body.get("prompt_logprobs")) is not None:
            rows = self.judged(tokens, count, body)
            described = [
                {
                    str(i): {"logprob": v, "rank": 1, "decoded_token": "?"}
                    for i, v in ({token: own} | best).items()
                }
                for token, (best, own) in zip(tokens[1:], rows, strict=True)
            ]
            choice["prompt_logprobs"] = [None, *described]
        elif (count := body.get("logprobs")) is not None:
            written = [*tokens, 0]  # one token is written, whatever it is
            rows = self.judged(written, count, body)
            as_ids = body.get("return_tokens_as_token_ids") and not self.texts
            choice["logprobs"] = {
                "tokens": [self.name(token, as_ids) for token in written],
                "token_logprobs": [None, *(own for _, own in rows)],
                "top_logprobs": [
                    None,
                    *(
                        {self.name(i, as_ids): v for i, v in ({token: own} | best).items()}
                        for token, (best, own) in zip(written[1:], rows, strict=True)
                    ),
                ],
            }
        return {"object": "text_completion", "choices": [choice]}

    @torch.no_grad()
    def continued(self, tokens: Sequence[int], count: int, *, skipped: bool) -> dict[str, Any]:
        """Return what is most likely to follow, and why it ends."""
        found: list[int] = []
        while len(found) < count:
            with self.lock:
                logits = self.network(input_ids=torch.tensor([[*tokens, *found]])).logits
            token = int(logits[0, -1, : len(self.tokenizer)].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            found.append(token)
        reason = "stop" if len(found) < count else "length"
        text = self.tokenizer.decode(found, skip_special_tokens=skipped)
        return {"text": text, "finish_reason": reason}

    def generate(self, body: Any) -> Any:
        tokens, start = body["input_ids"], body["logprob_start_len"]
        rows = self.judged(tokens, body["top_logprobs_num"], body["sampling_params"])[start:]
        pairs = zip(tokens[start + 1 :], rows, strict=True)
        meta = {
            "input_token_logprobs": [
                [None, tokens[start], None],
                *([own, token, None] for token, (_, own) in pairs),
            ],
            "input_top_logprobs": [
                None,
                *([[v, i, None] for i, v in best.items()] for best, _ in rows),
            ],
        }
        return {"text": "!", "meta_info": meta}

    def name(self, token: int, as_id: bool) -> str:
        text: str = self.tokenizer.decode([token])
        return f"token_id:{token}" if as_id else text

    @torch.no_grad()
    def judged(
        self, tokens: Sequence[int], count: int, asked: Mapping[str, Any]
    ) -> list[tuple[dict[int, Any], Any]]:
        """Return what is most likely at each place but the first, and how likely its token is."""
        if count > self.max_logprobs:
            raise refused(
                400,
                f"Requested prompt logprobs of {count}, which is greater than max allowed: "
                f"{self.max_logprobs}, for {list(tokens)}",
            )
        with self.lock:
            logits = self.network(input_ids=torch.tensor([list(tokens)])).logits[0, :-1].float()
        logprobs = self.sampled(logits, {**self.defaults, **asked}).log_softmax(-1)
        rows: list[tuple[dict[int, Any], Any]] = []
        for token, values in zip(tokens[1:], logprobs, strict=True):
            best = values.topk(count - self.fewer)
            ids = (best.indices + self.shift).tolist()
            rows.append((dict(zip(ids, best.values.tolist(), strict=True)), float(values[token])))
        if self.value != "as it is":
            best, own = rows[-1]
            rows[-1] = (best | {next(iter(best)): self.value}, own)
        return rows

    def sampled(self, logits: Tensor, asked: Mapping[str, Any]) -> Tensor:
        if not self.processed:
            return logits
        count = asked.get("top_k", -1)
        least = logits.topk(count).values[:, -1:] if count > 0 else -torch.inf
        return (logits / asked.get("temperature", 1.0)).where(logits >= least, -torch.inf)


def is_probe(body: Any) -> bool:
    """Return whether a request is about the text by which a server is checked."""
    return bool(body.get("echo")) and body.get("logprobs") is None


@contextmanager
def serving(server: TinyServer) -> Iterator[TinyServer]:
    """Serve on a free port; ``url`` is where the API begins."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: Any) -> None:
            try:
                status, told = 200, server.answered(self.path, dict(self.headers), body)
            except Refusal as refusal:
                status, told = refusal.status, refusal.content
            if status == 0:
                self.close_connection = True
                return
            sent = told.encode() if isinstance(told, str) else json.dumps(told).encode()
            try:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{server.url}/elsewhere")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)
            except ConnectionError:
                self.close_connection = True  # whoever asked has gone

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
