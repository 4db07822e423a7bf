"""The answers that a run of texts writes while it trains."""

from collections.abc import Sequence
from pathlib import Path

from diffdistill.answering import Draft, Prompt, decoded, language_family, prompts_of, write
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.sampling import inference
from diffdistill.session import Session


class Scribe:
    """Writes answers to the same prompts every N steps, as Markdown.

    Args:
        session: The built run.
        output: The run's folder.
        main: Whether this rank writes the files; every rank must take part.
    """

    def __init__(self, session: Session, output: Path, *, main: bool) -> None:
        self.session = session
        self.settings = session.config.answers
        self.folder = output / "samples"
        self.main = main
        self.prompts = [] if self.settings.every is None else prompts_of(session)

    def after_step(self, step: int) -> list[tuple[str, Path]]:
        """Return name and file of what was written after ``step``."""
        every, total = self.settings.every, self.session.config.train.steps
        if every is None or (step % every and step not in {1, total}):
            return []
        name = "average" if "average" in self.session.roles.by_name else "student"
        role = self.session.roles[name]
        with inference(self.session):
            drafts = [d for d in write(role, self.prompts, self.settings) if d.done]
        path = self.folder / f"step-{step:06d}.md"
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(transcript(step, self.prompts, drafts, language_family(role)))
        return [("answers", path)]


def transcript(
    step: int, prompts: Sequence[Prompt], drafts: Sequence[Draft], family: LanguageFamily
) -> str:
    """Return prompts, what the data answers, and the answers, as Markdown."""
    parts = [f"# Step {step}"]
    for index, prompt in enumerate(prompts):
        parts += ["## Prompt", _literally(prompt.text)]
        if prompt.reference is not None:
            parts += ["### Data", _literally(prompt.reference)]
        for draft in drafts:
            if draft.prompt == index:
                parts += ["### Answer", _literally(decoded(family, draft.tokens))]
    return "\n\n".join(parts) + "\n"


def _literally(text: str) -> str:
    """Return a text as a block of code, which is what keeps it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
