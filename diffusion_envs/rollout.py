"""What sampled paths hold: states, scores, noises, path KL, rewards, condition."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor

from ctrl.devices import sent


@dataclass(frozen=True, eq=False)
class Rollout:
    """Paths sampled from one policy, with their scores, costs, values and rewards.

    Time is RL time: step k leads from node k to node k + 1; node 0 is noise, the last node is data.
    Actions are scores, or expected data where the sampler starts without signal.
    Of a black-box sampler only the last node is known: nodes is 1 and steps 0.
    """

    states: Float[Tensor, "paths nodes *event"]
    means: Float[Tensor, "paths steps *event"]  # the policy's mean action at the left of each step
    actions: Float[Tensor, "paths steps *event"]  # the one that was used; means, if not drawn
    noises: Float[Tensor, "paths steps *event"]  # standard normals that drove the transitions
    reference_scores: Float[Tensor, "paths steps *event"] | None  # None: they were not asked for
    # path KL of each step from the pretrained model, nats; NaN where its scores were not asked for
    costs: Float[Tensor, "paths steps"]
    values: Float[Tensor, "paths nodes"] | None  # reward; the last column is the terminal reward
    rewards: Float[Tensor, " paths"]
    step_sizes: Float[Tensor, " steps"]  # the sampler's clock; DDIM's is int g^2 dt
    condition: Int64[Tensor, " paths"]  # index of the prompt
    group: int = 1  # paths in a row that share a prompt, and are compared together
    preferences: Float[Tensor, " paths"] | None = None  # larger is preferred within a group
    reward_parts: Float[Tensor, "paths parts"] | None = None  # None: the reward has none
    part_weights: Mapping[str, float] = field(default_factory=dict)  # of them, by name, in order

    def chosen(self, rows: Int64[Tensor, " rows"]) -> "Rollout":
        """The same roll-out, some of its paths only."""
        here = sent(rows, self.rewards.device)
        fields = {
            f.name: value[here if value.device == here.device else rows]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "step_sizes"
        }
        return dataclasses.replace(self, **fields)
