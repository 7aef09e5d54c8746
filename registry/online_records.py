"""How the stages ppo, grpo and rloo draw answers, score them and learn from them.

One decision: a word means the same in all of them, so `kl_coef` is also what papers call β, `cliprange` ε and
`ppo_epochs` μ or the number of iterations.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from registry.record import Names, Record, Steps, Text, split_numbers

Weights = Annotated[tuple[float, ...], BeforeValidator(split_numbers)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SamplingSettings(Record):
    """The distribution answers are drawn from; log-probabilities and KL are of the same one."""

    max_new_tokens: Steps = 64
    """Longest answer, in tokens; it comes on top of the prompt's `cutoff_len`."""
    temperature: Positive = 1.0
    """Logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the smallest set of most likely tokens with this share of the probability; 1 draws from all."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Draw from so many most likely tokens; 0 draws from all."""
    rollout_batch_size: Steps | None = None
    """Answers that a process draws together; nothing means all of a step's."""


class RewardSettings(Record):
    """Where scores come from and what is made of them."""

    reward_model: Text | None = None
    """Model that scores answers: an earlier stage, registry name, hub id or folder. One trained from the stage's own
    model is held as an adapter beside it; one with another tokenizer reads the answers as text, in its own template."""
    reward_funcs: Names = ()
    """Rewards beside the model's: `length`, `stopped`, `exact_match`, or code of your own, `FILE.py:function` or
    `module:function`, called as TRL calls its reward functions; the code counts."""
    reward_weights: Weights = ()
    """Weight of each reward, the model's first; a list or `1,-0.1`. Nothing means 1 each."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = None
    """Taken off the score of an answer that was cut at `max_new_tokens`."""
    score_clip: Positive | None = None
    """Scores are cut to between minus and plus this."""

    def resolved_weights(self) -> tuple[float, ...]:
        """`reward_weights`, or 1 for every source."""
        return self.reward_weights or (1.0,) * (len(self.reward_funcs) + (self.reward_model is not None))


class OnlineSettings(SamplingSettings, RewardSettings):
    """How all of them learn from drawn answers. A mini-batch is what other stages take in an optimizer step: per device
    x accumulation x processes."""

    ppo_buffer_size: Steps = 1
    """Mini-batches of answers that are drawn in a step."""
    ppo_epochs: Steps = 4
    """Times that the answers of a step are learned from. The default of stages grpo and rloo is 1."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Coefficient of the KL penalty: taken off the reward of each token (ppo), off the score of the answer (rloo), or
    part of the loss (grpo); where it begins, with `ppo_target`."""
    ppo_target: Positive | None = None
    """KL of an answer, in nats, that the coefficient is steered to (Ziegler et al. 2019); nothing keeps it fixed."""
    target_kl: Positive | None = None
    """KL per token between the policy and the one that drew the answers at which the rest of a step's updates is left
    out."""
    cliprange: Positive = 0.2
    """How far a token's probability (rloo: an answer's) may move from what it was, as a ratio, before its gradient is
    cut."""

    def resolved(self) -> dict[str, Any]:
        """The settings that others decide when they are not given."""
        return {"reward_weights": list(self.resolved_weights())}


class PpoSettings(Record):
    """What only proximal policy optimisation has, with its critic (Schulman et al. 2017, arXiv:1707.06347)."""

    ppo_score_norm: bool = False
    """Shift and scale scores by the mean and the spread of all scores so far."""
    ppo_whiten_rewards: bool = False
    """Scale the rewards of a step's tokens to variance 1."""
    cliprange_value: Positive = 0.2
    """How far the critic may move from what it expected before its gradient is cut."""
    gamma: Share = 1.0
    """Discount of later rewards."""
    lam: Share = 0.95
    """λ of the generalised advantage estimate: 1 trusts rewards, 0 the critic."""
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic; that of the policy when not set."""


class GroupSettings(Record):
    """Stages without a critic compare an answer with others to the same prompt: grpo (Shao et al. 2024,
    arXiv:2402.03300) and rloo (Ahmadian et al. 2024, arXiv:2402.14740)."""

    num_generations: Annotated[int, Field(ge=2, lt=2**31)] = 4
    """Answers drawn for every prompt."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the spread of scores among a prompt's answers, by that among all of the step, or by
    nothing."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean over what the loss is: all tokens of a mini-batch (`dapo`), tokens of an answer and then answers (`grpo`),
    or all tokens there could have been (`dr_grpo`)."""
