"""How many bits autoregressive models need for a byte of given texts, whatever their tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_pair import CausalPair
from diffdistill.pipelines.text_rows import Reading
from diffdistill.projection import token_logprob
from diffdistill.roles import Role
from diffdistill.types import Example


class Bits(NamedTuple):
    """What a model makes of texts.

    Attributes:
        model: The model's name.
        texts: Which: the ``answers`` of chats, or plain ``texts``.
        num_texts: How many.
        num_tokens: Their learned tokens, in the model's own tokenizer, ends included.
        num_bytes: The bytes these spell.
        bits_per_byte: Bits for each byte; those of the ends are counted, and their bytes not.
    """

    model: str
    texts: str
    num_texts: int
    num_tokens: int
    num_bytes: int
    bits_per_byte: float


def bits_per_byte(
    name: str, role: Role, examples: Sequence[Example], reading: Reading, batch_size: int = 16
) -> list[Bits]:
    """Return what a model makes of the answers of chats, and of plain texts, where there are any.

    A plain text's first token is given to a tokenizer without a start token, and not counted.

    Raises:
        UserError: If the model cannot read a text.
    """
    groups = {
        "answers": [example for example in examples if example.messages is not None],
        "texts": [example for example in examples if example.messages is None],
    }
    return [
        _measured(name, role, texts, chosen, reading, batch_size)
        for texts, chosen in groups.items()
        if chosen
    ]


def _measured(
    name: str,
    role: Role,
    texts: str,
    examples: Sequence[Example],
    reading: Reading,
    batch_size: int,
) -> Bits:
    family = role.family
    assert isinstance(family, CausalLM), f"{name} is no autoregressive model"
    pair, spelled = CausalPair(family, family, reading), family.speller.vocabulary()
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for start in range(0, len(examples), batch_size):
        batch = pair.collate(pair.encode(examples[start : start + batch_size]))
        text = pair.text(batch)
        prediction = role(pair.state(batch), pair.condition(batch))
        logprobs = token_logprob(prediction, text.tokens, mask=text.maskable)
        nats -= float(logprobs.double().sum())
        learned = text.tokens[text.maskable].tolist()
        num_tokens += len(learned)
        num_bytes += sum(len(spelled[token] or b"") for token in learned)
    bits = nats / (max(num_bytes, 1) * math.log(2.0))
    return Bits(name, texts, len(examples), num_tokens, num_bytes, bits)
