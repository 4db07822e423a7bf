"""The family ``causal-lm``: autoregressive language models, as transformers has them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.block_diffusion import positions_of, project
from diffdistill.pipelines.causal_sampling import positions_in, sample_answers
from diffdistill.pipelines.chats import Row, joined
from diffdistill.pipelines.network_family import NetworkFamily
from diffdistill.projection import Projection, dense, vocabulary
from diffdistill.rollouts import Answers, Sampling
from diffdistill.types import Condition, State


@dataclass(kw_only=True)
class CausalLM(NetworkFamily):
    """Any causal LM of transformers, as it is: each token is predicted from those before it.

    Attributes:
        max_length: Of methods that learn the data's own texts: tokens of the longest; the rest is
            cut off.
    """

    max_length: int = 1024

    def __post_init__(self) -> None:
        """Choose the type of the weights.

        Raises:
            UserError: If the attention is one for block masks, or no text has the length.
        """
        if self.max_length < 2:
            raise UserError(f"max_length must be at least 2, not {self.max_length}")
        if self.attention == "flex_attention":
            raise UserError(
                "attention flex_attention is for the block masks of diffusion: use sdpa, which "
                "takes the fastest kernel for causal ones"
            )
        super().__post_init__()

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, A, V]`` about the answers ``state.x`` ``[B, A]``, from one call.

        Those at i are made from the hidden state at the place before answer token i. Prompts are
        padded on the left, where nobody sees it and positions do not count it; what fills up an
        answer on the right comes after all that counts, and is not seen by it.

        Args:
            network: A causal LM of transformers.
            state: The answers.
            condition: Of ``prompts.prompt_condition``.
        """
        prompt, pads = condition["prompt"], condition["pads"]
        tokens = torch.cat([prompt, state.x], 1)[:, :-1]
        found = self.projected(network, tokens, pads, condition)
        return self.of_words(found._replace(hidden=found.hidden[:, prompt.shape[1] - 1 :]))

    def projected(
        self, network: nn.Module, tokens: Tensor, pads: Tensor, condition: Condition
    ) -> Projection:
        """Return logits ``[B, L, V]`` at all tokens ``[B, L]``, before the output head.

        Args:
            network: A causal LM of transformers.
            tokens: Prompts, padded on the left, and what follows.
            pads: How much of each row is padding, ``[B]``.
            condition: What the network is told besides.
        """
        seen = positions_in(tokens) >= pads[:, None]
        return project(network, tokens, seen, positions_of(pads, 0, tokens.shape[1]))

    def of_words(self, found: Projection) -> Projection:
        """Return a projection to the tokenizer's words, without what fills up the output head.

        Sizes of one vocabulary differ in that alone (Qwen2.5 has 151,936 and 152,064 rows).
        """
        if vocabulary(found) <= self.words:
            return found
        bias = None if found.bias is None else found.bias[: self.words]
        return found._replace(weight=found.weight[: self.words], bias=bias)

    @property
    def multiple(self) -> int:
        """What the length of a batch is a multiple of: what fast kernels like."""
        return 8

    def lay_out(self, row: Row) -> Row:
        """Return a text as the network reads it; empty where there is nothing to learn.

        A text is put after the tokenizer's start token; without one its first token is given, and
        not learned. It is followed by an end token, which is learned. What comes after the last
        answer of a chat is dropped.
        """
        if not any(row.maskable):
            return row.part(0, 0)
        kept = row.part(0, len(row.maskable) - row.maskable[::-1].index(True))
        start: int | None = self.tokenizer.bos_token_id
        if kept.maskable[0] and start is not None:
            kept = joined(Row([start], [False], [-1], kept.documents[:1]), kept)
        kept.maskable[0] = False
        if kept.tokens[-1] in self.tokenizer.all_special_ids:
            return kept
        return joined(kept, Row([self.eos_id], [True], [-1], kept.documents[-1:]))

    def fingerprint(self) -> str:
        """Return a hash of the tokenizer and of the options that alter how texts are read."""
        return self.hashed(type(self).__name__, self.max_length)

    def sample(
        self,
        network: nn.Module,
        condition: Condition,
        ids: Tensor,
        sampling: Sampling,
        draws: Draws,
        *,
        purpose: str,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Answers:
        """Return an answer to each prompt; it depends on purpose and id, not on its batch.

        Args:
            network: A causal LM of transformers.
            condition: Of ``prompts.prompt_condition``.
            ids: The number of each row, ``[B]``.
            sampling: How tokens are sampled.
            draws: Random numbers.
            purpose: What they are for.
            watch: Told the tokens ``[B]`` of each step, those after the end of a row too.
        """
        return sample_answers(
            network,
            condition["prompt"],
            condition["pads"],
            draws.uniform(purpose, ids, (sampling.max_tokens,)),
            sampling,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            words=self.words,
            watch=watch,
            never=self.placeholders,
            more=self.told_besides(network, condition),
        )

    @property
    def placeholders(self) -> list[int]:
        """Ids of tokens that stand for something else than text in a prompt: none, for text alone.

        They are never written in an answer.
        """
        return []

    def told_besides(self, network: nn.Module, condition: Condition) -> dict[str, Any]:
        """Return what a network is told besides the tokens of a prompt: nothing, for text alone."""
        return {}

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded network, of this family's checkpoint or of ``path``.

        Raises:
            UserError: If there is none, or it is another kind of model, or has another tokenizer.
        """
        network = super().network(path)
        self._check_logits(network, path or self.path)
        return network

    def _check_network(self, network: Any, folder: Path) -> None:
        if not getattr(network.config, "is_causal", True):
            raise UserError(
                f"{folder}: its config says is_causal: false, so it is a diffusion model: use the "
                "family bd3lm or mdlm"
            )
        rows = network.get_input_embeddings().num_embeddings
        if self.words > rows:
            raise UserError(
                f"{folder}: the tokenizer has {self.words} tokens, and the network {rows} "
                "embeddings"
            )

    @torch.no_grad()
    def _check_logits(self, network: Any, where: str) -> None:
        """Refuse a network whose logits are not those of its output head."""
        tokens = torch.tensor([[0, 1]], device=self.device)
        expected = network(input_ids=tokens, use_cache=False).logits.float()
        found = dense(self.projected(network, tokens, torch.zeros_like(tokens[:, 0]), {}))
        error = (found - expected).abs().max()
        if not error <= 0.02 * expected.abs().max() + 1e-3:
            raise UserError(
                f"{where}: {type(network).__name__} makes its logits otherwise than by its output "
                f"head (they differ by {error:.3g}), which the family causal-lm cannot stream"
            )
