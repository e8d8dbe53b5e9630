"""Ready loops: each a few lines over the pieces of ``ctrl``, to use or to copy.

Every agent is a generator that improves what it is given in place and yields after each update, so
that progress bars, logs, checkpoints and early stopping are the caller's:

    for paths in agents.actor_critic(problem, policy, value, sample, actor, critic, updates=200):
        print(ctrl.Estimate.of(ctrl.returns_to_go(problem, paths, policy)[:, 0]))

``sample`` is the caller's too: a function of nothing that returns fresh ``Paths`` of the current
policy. Optimisers are torch's; what they hold is what is learned.
"""

from ctrl.agents.actor_critic import actor_critic, online_actor_critic
from ctrl.agents.cppo import cppo
from ctrl.agents.descent import descend
from ctrl.agents.online import OnlineStep
from ctrl.agents.policy_evaluation import evaluate
from ctrl.agents.policy_iteration import policy_iteration
from ctrl.agents.q_learning import online_q_learning, q_learning

__all__ = [
    "OnlineStep",
    "actor_critic",
    "cppo",
    "descend",
    "evaluate",
    "online_actor_critic",
    "online_q_learning",
    "policy_iteration",
    "q_learning",
]
