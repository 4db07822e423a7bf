"""``diffdistill sample`` of text models: answers that appear as they settle."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from diffdistill.answering import (
    Draft,
    Prompt,
    decoded,
    language_family,
    prompts_of,
    spelled,
    write,
)
from diffdistill.checkpoints import write_atomic
from diffdistill.commands.sessions import models, open_session
from diffdistill.errors import UserError
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.sampling import inference
from diffdistill.session import text_pair

HIDDEN = "\u00b7"
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
REFRESHES = 12


def sample_text(
    source: str,
    *,
    prompts: Sequence[str] = (),
    compare: Sequence[str] = ("student",),
    checkpoint: str = "latest",
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Write answers of one or several models to prompts, and return a row for each.

    On a terminal they are shown side by side as they settle, what is hidden as dots; elsewhere each
    is printed when it is done. Every model has its own tokenizer and template.

    Args:
        source: A run's folder, or a config (before any training).
        prompts: Questions, texts to go on with, or texts to fill where they say ``<fill:N>``; none
            takes ``sample.prompts``, or else the first of the data.
        compare: Some of base, student, teacher, average.
        checkpoint: Which checkpoint of a run.
        output: A JSON lines file for the rows; None writes none.
        overrides: ``section.key=value`` changes of the config; how answers are sampled is all in
            the section ``sample``.

    Raises:
        UserError: If a model cannot be asked so.
    """
    session = open_session(source, checkpoint, overrides)
    text_pair(session)  # no pictures
    settings = session.config.answers
    asked = [Prompt(text) for text in prompts] or prompts_of(session)
    chosen = models(session, compare)
    for role in chosen.values():
        for prompt in asked:  # before any is written
            spelled(language_family(role), prompt, settings.chat)
    rows: list[dict[str, Any]] = []
    with page_of(asked, list(chosen), settings.num_answers) as page, inference(session):
        for name, role in chosen.items():
            family, start = language_family(role), time.perf_counter()
            for draft in write(role, asked, settings):
                page.take(name, family, draft)
                if draft.done:
                    rows.append(answer_row(name, family, asked[draft.prompt], draft, settings.seed))
            page.told(name, rows, time.perf_counter() - start)
    if output is not None:
        write_rows(rows, output)
    return rows


def answer_row(
    model: str, family: TokenFamily, prompt: Prompt, draft: Draft, seed: int
) -> dict[str, Any]:
    """Return what is written of an answer."""
    tokens = draft.tokens
    return {
        "prompt": prompt.text,
        "messages": prompt.messages,
        "reference": prompt.reference,
        "model": model,
        "number": draft.number,
        "seed": seed,
        "answer": decoded(family, tokens),
        "tokens": len(tokens),
        "ended": bool(tokens) and tokens[-1] in family.end_ids,
    }


def write_rows(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write rows as JSON lines.

    Raises:
        UserError: If that is not possible.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, lines.encode())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error


class Lines:
    """Prints each answer when it is done."""

    def __init__(self, prompts: Sequence[Prompt], console: Console) -> None:
        self.prompts = prompts
        self.console = console

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def take(self, model: str, family: TokenFamily, draft: Draft) -> None:
        """Print the answer if it is done."""
        if draft.done:
            self._print(f"> {self.prompts[draft.prompt].text}")
            self._print(f"[{model}] {shown(family, draft.tokens)}\n")

    def told(self, model: str, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Print how fast the model was, apart from its answers."""
        print(speed(model, rows, seconds), file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Page(Lines):
    """Shows answers side by side as they settle."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        models: Sequence[str],
        num_answers: int,
        console: Console,
    ) -> None:
        super().__init__(prompts, console)
        self.models = models
        self.num_answers = num_answers
        self.texts: dict[tuple[str, int, int], Text] = {}
        self.speeds: list[str] = []
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=REFRESHES)

    def __enter__(self) -> "Page":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()
        for line in self.speeds:
            print(line, file=sys.stderr, flush=True)

    def take(self, model: str, family: TokenFamily, draft: Draft) -> None:
        """Show the answer as far as it is."""
        self.texts[model, draft.prompt, draft.number] = drafted(family, draft)

    def told(self, model: str, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Keep how fast the model was until the page is done."""
        self.speeds.append(speed(model, rows, seconds))

    def table(self) -> Table:
        """Return a row for each answer, a column for each model."""
        table = Table("prompt", *self.models, show_lines=True, expand=True)
        for index, prompt in enumerate(self.prompts):
            for number in range(self.num_answers):
                texts = [self.texts.get((m, index, number), Text()) for m in self.models]
                table.add_row(Text(prompt.text), *texts)
        return table


def drafted(family: TokenFamily, draft: Draft) -> Text:
    """Return an answer with a dim dot for each token that is hidden."""
    text, known = Text(), list[int]()
    mask_id = family.mask_id if isinstance(family, LanguageFamily) else None
    for token in draft.tokens:
        if token != mask_id:
            known.append(token)
            continue
        text.append(shown(family, known))
        text.append(HIDDEN, style="dim")
        known = []
    return text.append(shown(family, known))


def shown(family: TokenFamily, tokens: Sequence[int]) -> str:
    """Return a text that cannot control a terminal."""
    return decoded(family, tokens).translate(CONTROLS)


def speed(model: str, rows: Sequence[dict[str, Any]], seconds: float) -> str:
    """Return in a line how many tokens a model wrote in so many seconds."""
    tokens = sum(row["tokens"] for row in rows if row["model"] == model)
    return f"{model}: {tokens} tokens in {seconds:.3g} s, {tokens / seconds:.3g} tokens per second"


def page_of(prompts: Sequence[Prompt], models: Sequence[str], num_answers: int) -> Lines:
    """Return what shows answers: side by side on a terminal, elsewhere one after the other."""
    console = Console()
    if console.is_terminal:
        return Page(prompts, models, num_answers, console)
    return Lines(prompts, console)
