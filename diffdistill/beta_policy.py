"""A Beta distribution that a small network makes of features, learned by REINFORCE.

The policy of ATESD's controller (arXiv:2605.11458), known to us from others' descriptions; what is
marked so is ours.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.distributions import Beta

NUM_FEATURES = 6

Start = Literal["neutral", "full"]
START_BIAS = {"neutral": (0.0, 0.0), "full": (6.0, -4.0)}


class BetaPolicy:
    """A Beta distribution of the exposure, by a network with one hidden layer, float64.

    ``(a, b) = 1 + softplus(f(features))``: both above 1, so it has one peak (ATESD). Ours are tanh
    and the start: ``neutral`` is Beta(1.69, 1.69), whose mean is 1/2, and ``full`` is
    Beta(7.00, 1.02), which peaks at 0.997; at first neither depends on the features.
    """

    def __init__(
        self, *, width: int, learning_rate: float, start: Start, generator: torch.Generator
    ) -> None:
        bound = 1.0 / math.sqrt(NUM_FEATURES)
        drawn = torch.rand(
            width, NUM_FEATURES + 1, generator=generator, dtype=torch.float64, device="cpu"
        )
        drawn = bound * (2.0 * drawn - 1.0)
        bias = torch.tensor(START_BIAS[start], dtype=torch.float64, device="cpu")
        self.weights = [
            drawn[:, :-1].clone().requires_grad_(),
            drawn[:, -1].clone().requires_grad_(),
            torch.zeros_like(drawn[:2, :1]).repeat(1, width).requires_grad_(),
            bias.requires_grad_(),
        ]
        self.optimizer = torch.optim.Adam(self.weights, lr=learning_rate)

    def concentrations(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b ``[...]`` of the distribution at features ``[..., 6]``."""
        first, first_bias, second, second_bias = self.weights
        hidden = torch.tanh(features @ first.T + first_bias)
        both = 1.0 + torch.nn.functional.softplus(hidden @ second.T + second_bias)
        return both[..., 0], both[..., 1]

    def loss(
        self,
        features: Tensor,
        exposures: Tensor,
        advantages: Tensor,
        *,
        entropy_target: float,
        entropy_penalty: float,
    ) -> Tensor:
        """Return the loss of some decisions, a scalar with a graph.

        ``mean(-A log pi(exposure) + c max(0, H[pi] - H_target)^2)`` (ATESD): only too much entropy
        costs something.
        """
        policy = Beta(*self.concentrations(features), validate_args=False)
        excess = (policy.entropy() - entropy_target).clamp(min=0.0)
        gain = advantages * policy.log_prob(exposures)
        return (entropy_penalty * excess.square() - gain).mean()

    def descend(self, loss: Tensor) -> None:
        """Take one step of Adam."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return weights and moments as JSON values."""
        moments = self.optimizer.state_dict()["state"].values()
        return {
            "weights": [weight.tolist() for weight in self.weights],
            "moments": [{name: value.tolist() for name, value in m.items()} for m in moments],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned."""
        with torch.no_grad():
            for weight, values in zip(self.weights, state["weights"], strict=True):
                weight.copy_(torch.tensor(values, dtype=torch.float64))
        moments = {
            i: {name: torch.tensor(value, dtype=torch.float64) for name, value in m.items()}
            for i, m in enumerate(state["moments"])
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def beta_sample(a: float, b: float, generator: torch.Generator) -> float:
    """Return a number of Beta(a, b) in [0, 1], made of one uniform number by the inverse CDF."""
    uniform = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
    return float(betaincinv(a, b, uniform))
