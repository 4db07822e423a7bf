"""The answers that a run of texts writes while it trains."""

from collections.abc import Sequence
from pathlib import Path

from diffdistill.answering import Draft, Prompt, decoded, prompts_of, token_family, write
from diffdistill.asking import as_prompt, questions_of, reply
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.roles import Role
from diffdistill.sample_settings import AnswerSampleSettings, TextSampleSettings
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
        self.folder = output / "samples"
        self.main = main
        settings = session.config.sample
        assert isinstance(settings, TextSampleSettings | AnswerSampleSettings)
        self.every = settings.every
        asks = isinstance(settings, AnswerSampleSettings)
        self.questions = questions_of(session) if asks and self.every else []
        self.prompts = [as_prompt(question) for question in self.questions]
        if not asks and self.every:
            self.prompts = prompts_of(session)

    def after_step(self, step: int) -> list[tuple[str, Path]]:
        """Return name and file of what was written after ``step``."""
        every, total = self.every, self.session.config.train.steps
        if every is None or (step % every and step not in {1, total}):
            return []
        name = "average" if "average" in self.session.roles.by_name else "student"
        role = self.session.roles[name]
        with inference(self.session):
            drafts = self._drafts(role)
        path = self.folder / f"step-{step:06d}.md"
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(transcript(step, self.prompts, drafts, token_family(role)))
        return [("answers", path)]

    def _drafts(self, role: Role) -> list[Draft]:
        config = self.session.config
        if self.questions:
            return list(reply(self.session, role, self.questions, config.replies))
        return [draft for draft in write(role, self.prompts, config.answers) if draft.done]


def transcript(
    step: int, prompts: Sequence[Prompt], drafts: Sequence[Draft], family: TokenFamily
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
