"""What a step of ``opd`` takes beyond the calls of its models, for the benchmark of text.

A step is all that the trainer does: answers, the teacher's reading, the student's, the divergence,
its gradient, the optimizer and what is logged. Beside it are the same calls by transformers and
torch alone, with logits that are all there at once.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from random_text import SIZES, random_network
from timing import paired
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diffdistill.config import parse_config
from diffdistill.distributed import Distributed
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.session import Session, build
from diffdistill.trainer import Trainer
from diffdistill.types import Example

SPECIALS = ("<eos>", "<pad>")


@dataclass(kw_only=True)
class RandomCausalLM(CausalLM):
    """A causal LM with random weights."""

    def _load(self, folder: Path) -> Any:
        return random_network(folder, self.weights_dtype, "sdpa", self.device)


@dataclass(frozen=True)
class Size:
    """How large a step is.

    Attributes:
        student: Its name in ``random_text.SIZES``.
        teacher: Likewise.
        rows: Answers.
        prompt: Tokens of each prompt.
        answer: Tokens of each answer.
        precision: As ``train.precision``.
    """

    student: str
    teacher: str
    rows: int
    prompt: int
    answer: int
    precision: str = "fp32"


QUICK = Size("small", "small-teacher", 2, 8, 8)
HERE = Size("small", "small-teacher", 16, 64, 128)
FULL = Size("student", "dense", 16, 256, 512, "bf16")


def save_model(folder: Path, name: str) -> Path:
    """Save a config without weights and a tokenizer of as many words; return the folder."""
    config = copy.deepcopy(SIZES[name])
    config.architectures, config.eos_token_id = ["Qwen3ForCausalLM"], 0
    config.save_pretrained(str(folder / name))
    words = [*SPECIALS, *(f"w{n}" for n in range(config.vocab_size - len(SPECIALS)))]
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIALS[0], pad_token=SPECIALS[1]
    )
    tokenizer.save_pretrained(str(folder / name))
    return folder / name


def session_of(folder: Path, size: Size) -> Session:
    """Return the session of a run of ``opd``."""
    family = {"name": f"{__name__}:RandomCausalLM", "path": str(save_model(folder, size.student))}
    teacher = {"name": f"{__name__}:RandomCausalLM", "path": str(save_model(folder, size.teacher))}
    values = {
        "family": family,
        "method": {"name": "opd", "max_tokens": size.answer},
        "roles": {"teacher": {"family": teacher}},
        "data": {"path": "none", "batch_size": size.rows},
        "train": {"precision": size.precision, "lr": 1e-5},
    }
    return build(parse_config(values))


def batch_of(session: Session, size: Size) -> dict[str, Any]:
    """Return questions of random words."""
    family: Any = session.family
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randint(4000, (size.rows, size.prompt), generator=rng)
    texts = [" ".join(f"w{n}" for n in row) for row in numbers.tolist()]
    examples = [Example(t, messages=({"role": "user", "content": t},)) for t in texts]
    batch: dict[str, Any] = family.collate(examples, list(range(size.rows)))
    return batch


def bare(session: Session, prompt: Tensor, size: Size) -> Callable[[], None]:
    """Return a task of the calls alone, by transformers and torch."""
    student, teacher = (copy.deepcopy(session.roles[n].network) for n in ("student", "teacher"))
    generating: Any = student
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    half = torch.autocast(prompt.device.type, torch.bfloat16, enabled=size.precision == "bf16")

    def logits(network: Any, tokens: Tensor) -> Tensor:
        found = network(input_ids=tokens[:, :-1], use_cache=False).logits
        return found[:, prompt.shape[1] - 1 :].float()

    def task() -> None:
        with half:
            with torch.no_grad():
                tokens = generating.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
                    max_new_tokens=size.answer, pad_token_id=1, eos_token_id=0,
                )  # fmt: skip
                theirs = logits(teacher, tokens).log_softmax(-1)
            ours = logits(student, tokens).log_softmax(-1)
        kept = (tokens[:, prompt.shape[1] :] != 1).float()
        error = ((ours.exp() * (ours - theirs)).sum(-1) * kept).sum() / kept.sum()
        error.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        error.item()

    return task


def step_overhead(folder: Path, size: Size, rounds: int) -> dict[str, Any]:
    """Return the seconds of a step, of its calls alone, and their ratio."""
    session = session_of(folder, size)
    batch = batch_of(session, size)
    family: Any = session.family
    trainer = Trainer(session, repeat(batch), Distributed())
    calls = bare(session, family.condition(batch)["prompt"], size)
    names = ("seconds_of_step", "seconds_of_calls", "ratio")
    times = dict(zip(names, paired(trainer.train_step, calls, rounds), strict=True))
    return {**times, "answers": size.rows, "prompt": size.prompt, "answer_tokens": size.answer}
