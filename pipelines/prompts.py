"""Questions as the prompts of one side: its template, its tokens, and what a model is told."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.pipelines.chats import Messages
from diffdistill.pipelines.token_family import TokenFamily
from diffdistill.types import Condition


def prompt_tokens(
    family: TokenFamily, messages: Messages, *, thinking: bool | None = None
) -> list[int]:
    """Return the token ids of a chat that ends where the answer begins.

    Without a chat template, one user's message is a text to go on with.

    Args:
        family: Whose tokenizer and template.
        messages: A chat that ends with the user's message.
        thinking: What a template is told as ``enable_thinking``; None tells it nothing.

    Raises:
        UserError: If the template refuses the chat, or there is none for several messages.
    """
    tokenizer = family.tokenizer
    if tokenizer.chat_template is None:
        ids = _bare(family, messages)
    else:
        told: Mapping[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            ids = tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **told,
            )
        except Exception as error:  # templates raise what they like
            raise UserError(
                f"the chat template of {family.path} refused a chat of roles "
                f"{[m['role'] for m in messages]}: {' '.join(str(error).split())}"
            ) from None
    if not ids:
        raise UserError(f"a prompt without a token, in the tokenizer of {family.path}")
    return list(ids)


def _bare(family: TokenFamily, messages: Messages) -> list[int]:
    if len(messages) > 1:
        raise UserError(
            f"the tokenizer of {family.path} has no chat template, and this is a chat of "
            f"{len(messages)} messages: set chat_template of its family"
        )
    ids: list[int] = family.tokenizer(messages[0]["content"])["input_ids"]
    return ids


def prompt_condition(prompts: Sequence[Sequence[int]], family: TokenFamily) -> Condition:
    """Return what a model is told before the answer.

    That is ``prompt``, token ids ``[B, P]`` padded on the left, and ``pads``, how much of each row
    is padding, ``[B]``.
    """
    total = max(len(prompt) for prompt in prompts)
    rows = [[family.pad_id] * (total - len(prompt)) + [*prompt] for prompt in prompts]
    return {
        "prompt": torch.tensor(rows, dtype=torch.long, device=family.device),
        "pads": torch.tensor([total - len(prompt) for prompt in prompts], device=family.device),
    }


def bare_prompts(condition: Condition) -> list[list[int]]:
    """Return the token ids of each prompt of ``prompt_condition``, without what fills it up."""
    rows = zip(condition["prompt"].tolist(), condition["pads"].tolist(), strict=True)
    return [tokens[pads:] for tokens, pads in rows]
