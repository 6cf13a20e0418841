"""STAC: Stochastic Actor-Critic.

Paper: "Stochastic Actor-Critic: Mitigating Overestimation via Temporal Aleatoric Uncertainty", Ozalp 2026,
arXiv 2601.00737.

Twin critics curb over-estimation by their disagreement, which costs a second network and says nothing of chance. STAC
has one critic, a Gaussian over the *one-step target*: its deviation is what reward, successor and the policy's sampling
make uncertain from one moment to the next, not the spread of the whole return, since targets bootstrap from the mean.
Targets and actor subtract beta times this deviation. Dropout and layer normalisation keep the critic from over-fitting.

    target        y = r + gamma (1 - terminated) (mu_target(s', a') - beta sigma_target(s', a') - alpha log pi(a'|s')),
                  with a' ~ pi(.|s')
    critic        mean of -log N(y; mu(s, a), sigma(s, a)^2)
    actor         mean of alpha log pi(a|s) - (mu(s, a) - beta sigma(s, a)),  a ~ pi(.|s)
    temperature   log alpha <- log alpha + rate alpha (target entropy - H),  H the mean of -log pi(a|s)
    target        psi_target <- psi_target + polyak (psi - psi_target)

Dropout is active, with fresh masks, in every pass of an update, that of the target critic included, and in acting while
training; off in evaluation. The law that `predict` reports is the critic's Gaussian: narrower than the return's, with a
mean below the return's by the pessimism of all later steps. There is no `--risk`: beta is the paper's.

Differences from the paper: the target entropy is that of its logs, -1 per action component (its table: half or less);
evaluation takes the policy's mode (its code: the mean of ten draws); the warm-up is uniform (its code: tanh of normal).

Run:      python algorithms/actor_critic/stac.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps (without dropout while acting): experiments/learning_curves.
"""

import itertools
from typing import Annotated, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Bounds, NonNegative, Positive, configuration
from jaxrl_dist.distributional import gaussian
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, experience, networks, policies, portable, soft
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(soft.Settings):
    """Settings of STAC; the defaults are the paper's. Floats can be swept within one compiled program."""

    temperature_learning_rate: NonNegative = 3e-4
    """relative step size of the temperature's gradient descent; 0 keeps the temperature where it starts"""
    initial_temperature: Positive = 0.2

    pessimism: NonNegative = 0.25
    """beta, standard deviations subtracted from the mean; 0 is indifferent to chance"""
    actor_dropout: Annotated[float, Bounds(0, 0.9)] = 0.01
    """probability that a hidden unit of the actor is dropped"""
    critic_dropout: Annotated[float, Bounds(0, 0.9)] = 0.01
    """probability that a hidden unit of the critic is dropped"""


# beta and dropout are the paper's per environment.
PRESETS = {
    "Pendulum-v1": soft.PENDULUM | {"pessimism": 0.125},
    "brax/hopper": {"pessimism": 0.5},
    "brax/halfcheetah": {"pessimism": 0.0, "actor_dropout": 0.0, "critic_dropout": 0.0},
    "brax/walker2d": {"pessimism": 0.125, "critic_dropout": 0.0},
    "brax/ant": {"pessimism": 0.25},
    "brax/humanoid": {"pessimism": 0.25, "critic_dropout": 0.0},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class DropoutMLP(nn.Module):
    """Perceptron `[batch, inputs]` -> `[batch, features[-1]]`: linear, dropout, layer norm, relu; at the end linear."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs: jax.Array, dropout: jax.Array | None) -> jax.Array:
        *hidden, _ = self.features
        if dropout is not None:  # the probability of a unit to be dropped, which flax's own layer wants static
            # Of all layers at once, since every draw is code of its own to compile.
            kept = draws.mask(self.make_rng("dropout"), 1 - dropout, (len(inputs), sum(hidden)))
            kept = jnp.split(kept, list(itertools.accumulate(hidden[:-1])), axis=-1)
        for index, width in enumerate(hidden):
            inputs = networks.MLP((width,), name=f"layer_{index}")(inputs)
            if dropout is not None:
                inputs = jnp.where(kept[index], inputs / (1 - dropout), 0)
            inputs = nn.relu(nn.LayerNorm(epsilon=1e-5, name=f"norm_{index}")(inputs))
        return networks.MLP(self.features[-1:], name=f"layer_{len(self.features) - 1}")(inputs)


class Actor(nn.Module):
    """Mean and log standard deviation of the pre-tanh action, `[batch, observation]` -> two `[batch, actions]`."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, observation: jax.Array, dropout: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        outputs = DropoutMLP((*self.hidden, 2 * self.action_size), name="mlp")(observation, dropout)
        mean, position = jnp.split(outputs, 2, axis=-1)
        return mean, jnp.log(floored_softplus(position))


class Critic(nn.Module):
    """Mean and standard deviation of the target, `[batch, observation]`, `[batch, actions]` -> two `[batch]`."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(
        self, observation: jax.Array, action: jax.Array, dropout: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        inputs = jnp.concatenate([observation, action], axis=-1)
        mean, position = DropoutMLP((*self.hidden, 2), name="mlp")(inputs, dropout).T
        return mean, floored_softplus(position)


def floored_softplus(position: jax.Array) -> jax.Array:
    """Standard deviations from unbounded outputs, at least softplus(-5) = 0.0067."""
    return nn.softplus(jnp.maximum(position, -5))


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    actor: Trained
    critic: Trained
    target_critic: chex.ArrayTree
    log_temperature: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def pessimistic(config: Config, mean: jax.Array, std: jax.Array) -> jax.Array:
    """mu - beta sigma, what targets and actor go by, `[batch]`."""
    chex.assert_equal_shape([mean, std])
    return mean - config.pessimism * std


def target_value(batch: Batch, next_value: jax.Array, next_log_density: jax.Array, temperature: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted soft and pessimistic value, all `[batch]`, or one value for all."""
    chex.assert_shape([batch.reward, batch.discount, next_log_density], (len(batch.reward),))
    chex.assert_is_broadcastable(next_value.shape, batch.reward.shape)
    return batch.reward + batch.discount * (next_value - temperature * next_log_density)


def critic_loss(mean: jax.Array, std: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of the plain negative log-likelihood of `[batch]` targets; mean and std: `[batch]`, or the same for all."""
    chex.assert_equal_shape([mean, std])
    chex.assert_is_broadcastable(mean.shape, (len(target),))
    return gaussian.negative_log_likelihood(mean, std, target).mean()


def actor_loss(value: jax.Array, log_density: jax.Array, temperature: jax.Array) -> jax.Array:
    """Soft value to be maximised, by pessimistic values `[batch]`; log_density: `[batch]`."""
    chex.assert_shape([value, log_density], (len(value),))
    return (temperature * log_density - value).mean()


def next_log_temperature(
    config: Config, log_temperature: jax.Array, log_density: jax.Array, target_entropy: jax.Array
) -> jax.Array:
    """One step of gradient descent in log alpha on alpha (H - target entropy): a factor on alpha, so never negative."""
    chex.assert_rank(log_density, 1)
    shortfall = target_entropy + log_density.mean()
    return log_temperature + config.temperature_learning_rate * jnp.exp(log_temperature) * shortfall


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """STAC on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    actor = Actor(config.actor_hidden, action_size)
    critic = Critic(config.critic_hidden)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)
    target_entropy = config.target_entropy_per_action * action_size

    def sample_action(actor_parameters, observation, key):
        action_key, dropout_key = jax.random.split(key)
        mean, log_std = actor.apply(actor_parameters, observation, config.actor_dropout, rngs={"dropout": dropout_key})
        return policies.squashed_gaussian(action_key, mean, log_std)

    def moments(critic_parameters, observation, action, key):
        return critic.apply(critic_parameters, observation, action, config.critic_dropout, rngs={"dropout": key})

    def update(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, Average]]:
        """One gradient step of critic, actor and temperature, and one of the target critic towards the critic."""
        next_action_key, next_key, critic_key, action_key, actor_key = jax.random.split(key, 5)
        temperature = jnp.exp(learner.log_temperature)

        # Target: pessimistic soft value of the policy's next action, by the target critic.
        next_action, next_log_density = sample_action(learner.actor.parameters, batch.next_observation, next_action_key)
        next_value = pessimistic(config, *moments(learner.target_critic, batch.next_observation, next_action, next_key))
        target = target_value(batch, next_value, next_log_density, temperature)

        # Critic: raise the likelihood of the target.
        def critic_objective(parameters):
            mean, std = moments(parameters, batch.observation, batch.action, critic_key)
            return critic_loss(mean, std, target), (mean, std)

        new_critic, (critic_value, (mean, std), norm) = descend(critic_adam, learner.critic, critic_objective)

        # Actor: climb the critic just updated, pessimistically, through actions of its own.
        def actor_objective(parameters):
            action, log_density = sample_action(parameters, batch.observation, action_key)
            value = pessimistic(config, *moments(new_critic.parameters, batch.observation, action, actor_key))
            return actor_loss(value, log_density, temperature), log_density

        new_actor, (actor_value, log_density, _) = descend(actor_adam, learner.actor, actor_objective)

        # Temperature: steer the policy's entropy to its target, without Adam, as in the author's code.
        log_temperature = next_log_temperature(config, learner.log_temperature, log_density, target_entropy)

        # Target critic: follow the critic slowly.
        target_critic = networks.polyak(learner.target_critic, new_critic.parameters, config.polyak)
        metrics = {
            "critic_loss": critic_value, "actor_loss": actor_value, "temperature": temperature,
            "largest_bonus": jnp.abs(temperature * next_log_density).max(), "critic_gradient_norm": norm,
            "entropy": -log_density.mean(), "value": mean.mean(), "std": std.mean(), "target": target.mean(),
        }  # fmt: skip
        return Learner(new_actor, new_critic, target_critic, log_temperature), jax.tree.map(average, metrics)

    def init(key: jax.Array) -> State:
        key, actor_key, critic_key, warmup_key = jax.random.split(key, 4)
        observation, action = jnp.zeros((1, *env.observation_space(env_params).shape)), jnp.zeros((1, action_size))
        actor_parameters = actor.init(actor_key, observation)
        critic_parameters = critic.init(critic_key, observation, action)
        last = critic_parameters["params"]["mlp"][f"layer_{len(config.critic_hidden)}"]["layers"]
        last["bias_0"] = last["bias_0"].at[0, 1].set(0)  # the deviation's
        log_temperature = soft.log_temperature(config)
        learner = Learner(
            begin(actor_adam, actor_parameters), begin(critic_adam, critic_parameters), critic_parameters,
            log_temperature,
        )  # fmt: skip
        filled = experience.warm_up(env, env_params, warmup_key, config, normalize=config.normalize_observations)
        return State(learner, filled, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action, _ = target_policy(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return state._replace(key=key, experience=lived), episodes

        def learn(state, _):
            key, sample_key, update_key = jax.random.split(state.key, 3)
            batch = experience.sample(state.experience, sample_key, config.batch_size, config.discount)
            learner, losses = update(state.learner, batch, update_key)
            return state._replace(key=key, learner=learner), losses

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        mean, _ = actor.apply(state.learner.actor.parameters, normalize(state.experience.normalizer, observation))
        return policies.squashed_mode(mean)

    def target_policy(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        observation = normalize(state.experience.normalizer, observation)
        action, log_density = sample_action(state.learner.actor.parameters, observation, key)
        return action, -jnp.exp(state.learner.log_temperature) * log_density

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        observation = normalize(state.experience.normalizer, observation)
        return gaussian.law(*critic.apply(state.learner.critic.parameters, observation, action))

    def export(state: State) -> dict[str, jax.Array]:
        parameters, arrays = state.learner.actor.parameters["params"]["mlp"], {}
        for index in range(len(config.actor_hidden) + 1):
            arrays |= {f"{name[:-2]}_{index}": x for name, x in parameters[f"layer_{index}"]["layers"].items()}
        for index in range(len(config.actor_hidden)):
            arrays |= {f"norm_{name}_{index}": x[None] for name, x in parameters[f"norm_{index}"].items()}
        return portable.mlp_policy(arrays, action_size, state.experience.normalizer)

    claim = Claim(target_policy, predict, config.discount)
    return Agent(init, step, memoryless(act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
