"""The studies that there are."""

from __future__ import annotations

from lvrpo.studies.study import Arm, Study

DEMO = Study(
    name="demo",
    title="What the rewards add",
    question=(
        "Does LVRPO teach the model what no decoding brings out of its warm start, "
        "more than as much supervised training does, and by its rewards?"
    ),
    base=Arm("lvrpo", "LVRPO"),
    arms=(
        # Without run.steps named it takes the compute of the base's policy phase.
        Arm("supervised", "supervised, equal compute", ("run.objective=supervised",)),
        Arm("shuffled", "rewards shuffled (control)", ("run.shuffle_rewards=true",)),
    ),
)

REWARD_BALANCE = Study(
    name="reward-balance",
    title="How rewards are balanced",
    question=(
        "Does it matter whether rewards are normalised one by one before they are added "
        "(decoupled) or added first and normalised as a sum, as in the paper; what does each "
        "reward teach alone; and how should r_sem pool over the windows of a drawing?"
    ),
    base=Arm(
        "decoupled",
        "all rewards, decoupled",
        (
            "rewards.generate={r_ins = 1.0, r_sem = 0.25, r_kn = 0.25}",
            "rewards.advantage=decoupled",
            "rewards.semantic_pool=softmax",
        ),
    ),
    arms=(
        Arm("sum", "all rewards, summed first", ("rewards.advantage=paper",)),
        Arm(
            "paper",
            "the paper's: summed, binary r_ins, max pool",
            (
                "rewards.advantage=paper",
                "rewards.strict_weight=1.0",
                "rewards.semantic_pool=max",
                "rewards.generate={r_ins = 1.0, r_sem = 1.0, r_kn = 1.0}",
            ),
        ),
        Arm("r_ins", "r_ins alone", ("rewards.generate={r_ins = 1.0}",)),
        Arm("r_sem", "r_sem alone", ("rewards.generate={r_sem = 1.0}",)),
        Arm("r_kn", "r_kn alone", ("rewards.generate={r_kn = 1.0}",)),
        Arm("topk", "r_sem pools by topk", ("rewards.semantic_pool=topk",)),
        Arm("max", "r_sem pools by max", ("rewards.semantic_pool=max",)),
    ),
    settings=("run.steps=50", "run.eval_items=512", "run.frontier_items=64"),
    skills=("generate",),
)

MACHINERY = Study(
    name="machinery",
    title="What each part of the machinery adds",
    question=(
        "What is lost where one part of the method is left out or changed: the clip of the ratio, "
        "the KL to the warm start, decoupled rewards, several updates of one rollout, windows of "
        "stochastic steps that are drawn anew?"
    ),
    base=Arm(
        "base",
        "the base",
        (
            "loss.text_clip_low=0.05",
            "loss.text_clip_high=0.05",
            "rewards.advantage=decoupled",
            "optimizer.minibatches=2",
            "rollout.window=random",
        ),
    ),
    arms=(
        Arm(
            "no-clip",
            "no clip of the ratio",
            ("loss.text_clip_low=1e6", "loss.text_clip_high=1e6", "loss.image_clip=1.0"),
        ),
        Arm(
            "wide-clip",
            "text ratio clipped at 0.2",
            ("loss.text_clip_low=0.2", "loss.text_clip_high=0.2"),
        ),
        Arm("no-kl", "no KL to the warm start", ("loss.text_kl=0.0", "loss.image_kl=0.0")),
        Arm("sum", "rewards summed first", ("rewards.advantage=paper",)),
        Arm("one-minibatch", "one minibatch a pass", ("optimizer.minibatches=1",)),
        Arm("first", "window of steps is the first", ("rollout.window=first",)),
        Arm("sliding", "window of steps slides", ("rollout.window=sliding",)),
    ),
    settings=("run.steps=50", "run.eval_items=512", "run.frontier_items=64"),
    skills=("understand", "generate"),
)

STUDIES = {study.name: study for study in (DEMO, REWARD_BALANCE, MACHINERY)}
