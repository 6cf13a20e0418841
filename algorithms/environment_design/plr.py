"""PLR: Prioritized Level Replay, and robust PLR, for environments with levels.

Papers: "Prioritized Level Replay", Jiang, Grefenstette, Rocktäschel, arXiv 2010.03934; robust PLR and the scores of
regret: "Replay-Guided Adversarial Environment Design", Jiang, Dennis, Parker-Holder, Foerster, Grefenstette,
Rocktäschel, arXiv 2110.02439.

An agent learns little from levels that it has mastered, and little from those it cannot solve. Random levels are played
and ranked by how much the agent could still gain on them; those of high rank are played again. Robust PLR learns from
replayed levels alone: the new ones are only looked at, so that the agent trains on levels that were chosen, and the two
of them approach the policy of smallest regret.

    replay          with probability p where the buffer is filled enough, else new levels
    weight          (1 - rho) P_S + rho P_C,  P_S ~ (1 / rank of the score)^(1 / beta),  P_C ~ time since last played
    score, MaxMC    mean over completed episodes of the mean over their steps of (R_max - V(s_t))
    score, PVL      the same of max(A_t, 0)
    insert          into a free place, or in place of the level of least weight if the score is above that one's

R_max is the largest return ever seen on the level, A_t the advantage. The student is PPO (`policy_gradient/ppo.py`).
`--robust false` is PLR; with `--replay-probability 0` too it is domain randomisation.

A level is the parameters of an environment, which has `sample_level(key, env_params) -> env_params`.

Differences from the papers' code and from JaxUED's, whose numbers the defaults are: the student is a perceptron, not an
LSTM; the levels of one iteration differ from each other (there one may be drawn twice, and the last score is kept);
step sizes do not fall; where `--annealing-steps` lets them, only iterations that learn count. Evaluation plays levels
as the environment draws them, and takes the mode.

Run:      python algorithms/environment_design/plr.py --env-id maze
Expected: maze above 0.8 of 1 within 500,000 steps; experiments/levels has mazes that were never seen.

The scores are as good as the values: where rewards depend on what the student neither sees nor remembers, such as the
time, easy levels rank first (experiments/levels).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, Positive, configuration, require
from jaxrl_dist.learning import clipped, interaction, levels, returns, rollouts
from jaxrl_dist.learning.clipped import Batch, normalized, policy_loss, value_loss
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.levels import Levels
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import require_environment

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(clipped.Settings):
    """Settings of PLR; the defaults are JaxUED's for mazes. Floats can be swept within one program."""

    num_envs: Count = 32
    """environments stepped in parallel, each on a level of its own"""
    num_steps: Count = 256
    num_epochs: Count = 5
    num_minibatches: Count = 1
    num_levels: Count = 4_000
    """levels that are kept"""
    robust: bool = True
    """learn from replayed levels alone"""
    score: Literal["maximum_monte_carlo", "positive_value_loss"] = "maximum_monte_carlo"
    """what levels are ranked by"""

    discount: Fraction = 0.995
    gae_decay: Fraction = 0.98
    entropy_weight: NonNegative = 1e-3
    learning_rate: NonNegative = 1e-4
    replay_probability: Fraction = 0.8
    """p, how often levels are replayed rather than drawn"""
    minimum_fill: Fraction = 0.5
    """part of the buffer that is filled before any level is replayed"""
    temperature: Positive = 0.3
    """beta, how evenly levels of all ranks are replayed"""
    staleness: Fraction = 0.3
    """rho, weight of the time since a level was last played"""


# Sizes for a CPU.
PRESETS = {
    "maze": {
        "total_steps": 2_000_000, "num_envs": 16, "num_steps": 128, "num_minibatches": 4, "num_levels": 256,
        "replay_probability": 0.5, "entropy_weight": 0.01, "learning_rate": 5e-4,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    interaction: Interaction
    levels: Levels
    key: jax.Array


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PLR on the levels of one environment; called inside the trace, so that the floats of `config` may be tracers."""
    require(
        config.num_levels >= config.num_envs,
        f"--num-levels is {config.num_levels}; it must be at least --num-envs = {config.num_envs}",
    )
    clock = clipped.clock_of(config)
    network = clipped.network_of(config, env, env_params)
    require_environment(
        hasattr(env, "sample_level"), env, "levels cannot be drawn", "sample_level(key, env_params) -> env_params"
    )
    optimizer = clipped.optimizer_of(config)
    policy = clipped.policy_of(network, config.discount)

    def new_levels(key: jax.Array) -> Any:
        keys = jax.random.split(key, config.num_envs)
        return interaction.strengthen(jax.vmap(env.sample_level, in_axes=(0, None))(keys, env_params))

    def begun(key: jax.Array, level: Any) -> Interaction:
        return interaction.start(env, level, key, config.num_envs, per_environment=True)

    def update(learner: Trained, batch: Batch) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step of PPO on a minibatch."""

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            of_policy = policy_loss(ratio, normalized(batch.advantage), config.clip_range)
            of_value = value_loss(value, batch.value, batch.target, config.clip_range if config.clip_values else None)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy
            return loss, {"policy_loss": of_policy, "value_loss": of_value, "entropy": entropy}

        learner, (loss, metrics, norm) = descend(optimizer, learner, objective)
        return learner, metrics | {"loss": loss, "gradient_norm": norm}

    def init(key: jax.Array) -> State:
        key, network_key, levels_key, start_key = jax.random.split(key, 4)
        shape = env.observation_space(env_params).shape
        learner = begin(optimizer, network.init(network_key, jnp.zeros((1, *shape))))
        level = new_levels(levels_key)
        buffer = levels.create(jax.tree.map(lambda x: x[0], level), config.num_levels)
        return State(learner, begun(start_key, level), buffer, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, replays_key, new_key, draw_key, start_key, collect_key, epochs_key = jax.random.split(state.key, 7)

        # Levels: all of the buffer, or all new. Both are made and one is taken, since runs side by side do both anyway.
        filled = state.levels.size >= jnp.maximum(config.minimum_fill * config.num_levels, config.num_envs)
        replays = filled & (jax.random.uniform(replays_key) < config.replay_probability)
        weight = levels.weights(state.levels, config.temperature, config.staleness)
        places = levels.draw(draw_key, weight, config.num_envs)
        level = either(replays, levels.take(state.levels, places), new_levels(new_key))

        # Rollout: each level from its start, again and again.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, drawn = policy.explore(state, observation, key)
            return action, memory, drawn

        now = begun(start_key, level)._replace(largest_reward=state.interaction.largest_reward)
        now, (lived, (action, log_density)), episodes = rollouts.collect(
            env, level, now, collect_key, config.num_steps, follow, per_environment=True
        )

        # Advantages: with the value of the true successor, also at a time limit.
        parameters, done = state.learner.parameters, lived.terminated | lived.truncated
        value, next_value = (
            jax.vmap(lambda x: network.apply(parameters, x)[1])(x) for x in (lived.observation, lived.next_observation)
        )
        advantage = returns.gae(
            lived.reward, value, next_value, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )

        # Scores: how far the agent is from the best that was ever seen there.
        known = jnp.where(replays, state.levels.largest_return[places], -jnp.inf)
        largest = jnp.maximum(known, levels.largest_return(lived.reward, done))
        if config.score == "positive_value_loss":
            score = levels.positive_value_loss(advantage, done)
        else:
            score = levels.maximum_monte_carlo(value, largest, done)
        buffer = either(
            replays,
            levels.update(state.levels, places, score, largest),
            levels.insert(state.levels, level, score, largest, config.temperature, config.staleness),
        )

        # Epochs of minibatches; robust PLR keeps nothing of what it would have learned from new levels.
        batch = Batch(lived.observation, action, log_density, value, advantage, advantage + value)
        batch = jax.tree.map(lambda x: x.reshape(clock.env_steps, *x.shape[2:]), batch)
        learner, losses = rollouts.epochs(
            update, state.learner, batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip
        learns = replays if config.robust else jnp.ones((), bool)

        metrics = jax.tree.map(lambda x: average(x, jnp.broadcast_to(learns, x.shape)), losses)
        metrics |= jax.tree.map(
            average, {"value": value, "target": batch.target, "replays": replays, "levels": buffer.size}
        )
        metrics |= {"score": average(score, jnp.isfinite(score))}
        return State(either(learns, learner, state.learner), now, buffer, key), episodes | metrics

    return Agent(init, step, memoryless(policy.act), clock, policy.claim, policy.export)


def either(first: jax.Array, one: Any, other: Any) -> Any:
    """`one` where `first` `[]` holds, else `other`, of trees with equal shapes."""
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
