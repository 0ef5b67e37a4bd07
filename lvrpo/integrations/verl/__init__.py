"""lvrpo's losses, estimators and head in the shapes of verl's actor.

Five lines to start with, and what is refused: docs/integrations.md. verl itself is imported by
`register` and `forward_with_lvrpo_backend` alone.
"""

from __future__ import annotations

from functools import partial

from lvrpo.integrations.verl.advantages import ESTIMATORS, UNREACHED
from lvrpo.integrations.verl.head import forward_with_lvrpo_backend, linear_cross_entropy
from lvrpo.integrations.verl.losses import policy_loss
from lvrpo.integrations.verl.release import require_verl
from lvrpo.params.from_verl import LOSSES, PREFIX

__all__ = [
    "ESTIMATORS",
    "forward_with_lvrpo_backend",
    "linear_cross_entropy",
    "policy_loss",
    "register",
]


def register() -> None:
    """Give verl lvrpo's losses and estimators, by its own names after "lvrpo_".

    `actor.policy_loss.loss_mode` may then be "lvrpo_gspo" and so on; "lvrpo" is "lvrpo_vanilla".
    `algorithm.adv_estimator` may be "lvrpo_rloo" and so on. verl's own names are what they were.

    Raises:
        ModuleNotFoundError: verl is not installed.
        ImportError: its release is none that lvrpo is tested with.
    """
    require_verl()
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    for loss in LOSSES:
        register_policy_loss(PREFIX + loss)(partial(policy_loss, loss))
    register_policy_loss(PREFIX[:-1])(partial(policy_loss, "vanilla"))
    for name, estimator in ESTIMATORS.items():
        if name not in UNREACHED:
            register_adv_est(PREFIX + name)(estimator)
