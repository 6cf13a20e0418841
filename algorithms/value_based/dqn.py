"""DQN: Deep Q-Networks, with double Q-learning and duelling heads as options.

Papers: "Human-level control through deep reinforcement learning", Mnih et al., Nature 518, 2015, doi
10.1038/nature14236 (before it, without the target network: "Playing Atari with Deep Reinforcement Learning", arXiv
1312.5602); "Deep Reinforcement Learning with Double Q-learning", van Hasselt, Guez, Silver, AAAI 2016, arXiv
1509.06461; "Dueling Network Architectures for Deep Reinforcement Learning", Wang et al., ICML 2016, arXiv 1511.06581.

Q-learning with a network: transitions are replayed in random order, which breaks their correlation, and the target is
computed by a copy of the network that stands still for a while. The largest of several noisy estimates is biased
upwards; `--double` lets the online network choose the action that the target network evaluates. `--dueling` splits the
network into the state's value and the actions' advantages.

    target        y = r + gamma (1 - terminated) max over a' of Q_target(s', a')
    double        y = r + gamma (1 - terminated) Q_target(s', argmax over a' of Q(s', a'))
    loss          mean of (Q(s, a) - y)^2 / 2, or of huber(Q(s, a) - y)
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy

Differences from the paper: errors are clipped (by a Huber loss) only where rewards are: both are off by default, and on
with `--preset paper`. Clipped errors with large returns make values drift to what never failing would be worth.
Adam instead of RMSProp, with the paper's step size; epsilon falls from the first step on, where the authors' code waits
for the end of the warm-up; images pass MinAtar's convolution instead of the paper's; evaluation without exploration.
The target is copied every 10,000 updates as the paper's table says; the authors' code counts agent steps, a quarter of
that. `--num-steps` n > 1 replaces r and gamma by the n-step return and gamma^n. Duelling streams have a hidden layer
each, and their gradients are neither clipped nor scaled (section 4.2 there).

Run:      python algorithms/value_based/dqn.py --env-id CartPole-v1
Expected: CartPole-v1 475 of 500 and above within 500,000 steps, with relapses: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import NonNegative, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of DQN. Floats can be swept within one compiled program."""

    huber_threshold: NonNegative = 0.0
    """error beyond which the loss is linear, in units of return, so that values tend to the target's median; 0: the
    squared error throughout"""

    double: bool = False
    """choose the target's action by the online network"""
    dueling: bool = False
    """give the last hidden layer two streams, value and advantage"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's. A Huber
# threshold of 1 is for returns of a few units. With returns of 100 rare falls would pull no harder than small errors,
# and all values drift to 100.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"huber_threshold": 100.0},
    "Acrobot-v1": greedy.ACROBOT | {"huber_threshold": 100.0},
    "Catch-bsuite": greedy.CATCH | {"huber_threshold": 1.0},
    "Breakout-MinAtar": greedy.BREAKOUT | {"huber_threshold": 1.0},
    "paper": greedy.ATARI | {"target_period": 10_000, "epsilon_end": 0.1, "huber_threshold": 1.0},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Action values, `[batch, *observation]` -> `[batch, actions]`."""

    hidden: tuple[int, ...]
    num_actions: int
    dueling: bool

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        return networks.ActionHead(self.hidden[-1], self.num_actions, 1, self.dueling, name="head")(features)[..., 0]


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_value(batch: Batch, next_values: jax.Array, choosing_values: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted value at the action that `choosing_values` prefer: `[batch]`.

    Both `[batch, actions]`: the target network's values, and those that choose (its own, or for double Q-learning the
    online network's).
    """
    chex.assert_rank(next_values, 2)
    chex.assert_equal_shape([next_values, choosing_values])
    chex.assert_shape([batch.reward, batch.discount], (len(next_values),))
    return batch.reward + batch.discount * networks.at_action(next_values, choosing_values.argmax(-1))


def loss_of(values: jax.Array, target: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Mean Huber loss of the values of the actions taken, both `[batch]`; with threshold 0 half the squared error."""
    chex.assert_rank(values, 1)
    chex.assert_equal_shape([values, target])
    bound = jnp.where(threshold > 0, threshold, jnp.inf)
    error = values - jax.lax.stop_gradient(target)
    # The gradient is the clipped error, the paper's. Not by `optax.huber_loss`: its derivative is a difference of
    # thresholds, which a wide one rounds away.
    clipped = jnp.clip(error, -bound, bound)
    return (clipped * (error - clipped / 2)).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """DQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.dueling)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the value of the successor's greedy action by the target network. With `double` the online network has
        # chosen, so that the error that makes it look best is not in its value (arXiv 1509.06461).
        next_values = network.apply(learner.target_network, batch.next_observation)
        choosing_values = (
            network.apply(learner.network.parameters, batch.next_observation) if config.double else next_values
        )
        target = target_value(batch, next_values, choosing_values)

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            values = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(values, target, config.huber_threshold), values

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        parameters = network.init(network_key, jnp.zeros((1, *env.observation_space(env_params).shape)))
        learner = Learner(begin(adam, parameters), parameters, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(learner, filled, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = policy.explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def action_values(state: State, observation: jax.Array) -> jax.Array:
        return network.apply(state.learner.network.parameters, observation)

    policy = greedy.policy_of(config, action_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(networks.at_action(action_values(state, observation), action)[:, None])

    def export(state: State) -> dict[str, jax.Array]:
        return portable.greedy_policy(state.learner.network.parameters["params"], num_actions)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
