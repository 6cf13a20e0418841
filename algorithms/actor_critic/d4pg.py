"""D4PG: Distributed Distributional Deterministic Policy Gradients.

Paper: "Distributed Distributional Deterministic Policy Gradients", Barth-Maron et al., ICLR 2018, arXiv 1804.08617.

DDPG with the critic of C51: the law of the return as probabilities of fixed, evenly spaced atoms, trained by
cross-entropy to the projected law of an n-step target. Many environments in parallel feed one learner, each disturbed
by its own noise. The actor climbs the mean of the learned law.

    support       z_i = v_min + i (v_max - v_min) / (num_atoms - 1),  Z(s, a) = z_i with probability p_i(s, a)
    target        m = projection onto the support of the law of
                  sum over k < n of gamma^k r_k + gamma^n (1 - terminated) Z_target(s_n, mu_target(s_n))
    critic        mean of -sum over i of m_i log p_i(s, a)
    actor         mean of |mu(s) - constant(mu(s) + g)|^2 / 2,  g = dE[Z(s, a)]/da at a = mu(s), no longer than
                  `action_gradient_bound`; its gradient is -g dmu/dparameters, the deterministic policy gradient
    target copy   every `target_period` updates, actor and critic
    exploration   a = clip(mu(s) + noise, -1, 1),  noise ~ N(0, sigma^2) per action component

The bound on g and the defaults are those of acme, the code from the authors' laboratory. Differences from the paper and
from that code:
- networks are plain perceptrons with relu (theirs: elu, with a normalised first layer); replay is uniform, as acme's
  (the paper found that priorities help little);
- environments and learner take turns within one program (theirs run apart, at the same ratio of 32 samples to a step),
  and the actor that acts is the newest (acme: the target copy);
- the critic is updated first, and the actor climbs the new one (acme: both gradients are taken before either moves) at
  the observations of the batch (acme: at their successors);
- the warm-up's actions are uniform (acme: the first policy's with its noise), and gradients are not cut (acme: at a
  norm of 40; below 1 in our runs).
A window of rewards that meets a time limit is cut there and bootstraps from its true last state. With `--risk` the
actor climbs another risk measure of the law; a tail within one atom has no slope, so a small LEVEL wants atoms closer
together than the returns spread.

Run:      python algorithms/actor_critic/d4pg.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, Positive, Real, configuration
from jaxrl_dist.distributional import categorical
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(Settings):
    """Settings of D4PG; defaults from the authors' code. Floats can be swept within one compiled program."""

    num_envs: Count = 32
    updates_per_iteration: Count = 4
    warmup_steps: Count = 1_024
    num_steps: Count = 5
    """n, steps of reward in a target before it bootstraps"""
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    target_period: Count = 100
    """updates between two copies of actor and critic into their targets"""
    actor_learning_rate: NonNegative = 1e-4
    """step size of the actor's Adam"""
    critic_learning_rate: NonNegative = 1e-4
    """step size of the critic's Adam"""
    exploration_noise: NonNegative = 0.3
    """sigma, standard deviation of the noise on the actions taken"""
    action_gradient_bound: Positive = 1.0
    """largest length of the value's gradient in the action, in units of return"""

    actor_hidden: tuple[int, ...] = (300, 200)
    """widths of the actor's hidden layers"""
    critic_hidden: tuple[int, ...] = (400, 300)
    """widths of the critic's hidden layers"""
    num_atoms: Count = 51
    """atoms of the support"""
    v_min: Real = -150.0
    """lowest atom, in units of the discounted return"""
    v_max: Real = 150.0
    """highest atom"""
    risk: str = "neutral"
    """the actor's aim: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL, power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Pendulum's sizes are ours, for a CPU; its rewards lie in [-16.3, 0].
PRESETS = {
    "Pendulum-v1": {
        "num_envs": 1, "updates_per_iteration": 1, "warmup_steps": 1_000, "batch_size": 128, "num_steps": 3,
        "actor_hidden": (64, 64), "critic_hidden": (64, 64), "actor_learning_rate": 3e-4,
        "critic_learning_rate": 1e-3, "v_min": -1650.0, "v_max": 0.0,
    },
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """The deterministic policy mu, `[batch, observation]` -> `[batch, actions]` in [-1, 1].

    Its last layer starts near zero: a tanh that an early, wrong critic drives to its end has no gradient to return by.
    """

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        mlp = networks.MLP((*self.hidden, self.action_size), output_bound=3e-3, name="mlp")
        return jnp.tanh(mlp(observation))


class Critic(nn.Module):
    """Logits of the atoms, `[batch, observation]`, `[batch, actions]` -> `[batch, atoms]`."""

    hidden: tuple[int, ...]
    num_atoms: int

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        inputs = jnp.concatenate([observation, action], axis=-1)
        return networks.MLP((*self.hidden, self.num_atoms), name="mlp")(inputs)


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    actor: Trained
    critic: Trained
    target_actor: chex.ArrayTree
    target_critic: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_masses(batch: Batch, next_masses: jax.Array, support: jax.Array) -> jax.Array:
    """Law of reward + discount * Z for Z with the masses `[batch, atoms]`, projected onto the support `[atoms]`."""
    chex.assert_rank(next_masses, 2)
    chex.assert_shape([batch.reward, batch.discount], next_masses.shape[:1])
    chex.assert_shape(support, next_masses.shape[1:])
    return categorical.project_return(batch.reward, batch.discount, next_masses, support)


def critic_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross-entropy of the predicted laws to their targets, both `[batch, atoms]`."""
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape([logits, target])
    return categorical.cross_entropy(target, logits).mean()


def actor_loss(action: jax.Array, action_gradient: jax.Array, bound: float | jax.Array) -> jax.Array:
    """Half the squared distance of `[batch, actions]` to where the cut gradient of the value points, a constant.

    As in acme; the slope in the action is minus the cut gradient.
    """
    chex.assert_rank(action, 2)
    chex.assert_equal_shape([action, action_gradient])
    length = jnp.linalg.norm(action_gradient, axis=-1, keepdims=True)
    step = action_gradient * jnp.minimum(1, bound / jnp.maximum(length, 1e-12))
    return 0.5 * ((action - jax.lax.stop_gradient(action + step)) ** 2).sum(-1).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """D4PG on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    actor = Actor(config.actor_hidden, action_size)
    critic = Critic(config.critic_hidden, config.num_atoms)
    risk = risks.parse(config.risk)
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)

    def law_of(critic_parameters, observation, action) -> Law:
        return Law(support, jax.nn.softmax(critic.apply(critic_parameters, observation, action)))

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, Average]]:
        """One gradient step of critic and actor, and the copies into the target networks when they are due."""
        # Target: n rewards and the target critic's law of the target actor's next action, projected.
        next_action = actor.apply(learner.target_actor, batch.next_observation)
        next_masses = law_of(learner.target_critic, batch.next_observation, next_action).masses
        target = target_masses(batch, next_masses, support)

        # Critic: cross-entropy to the target.
        def critic_objective(parameters):
            logits = critic.apply(parameters, batch.observation, batch.action)
            return critic_loss(logits, target), (jax.nn.softmax(logits) * support).sum(-1)

        new_critic, (critic_value, values, norm) = descend(critic_adam, learner.critic, critic_objective)

        # Actor: climb the critic just updated, no further than the bound.
        def actor_objective(parameters):
            action = actor.apply(parameters, batch.observation)
            # The value of a row depends on the action of that row alone: the gradient of the sum has them all.
            action_gradient = jax.grad(
                lambda a: risks.value(risk, law_of(new_critic.parameters, batch.observation, a), ascending=True).sum()
            )(jax.lax.stop_gradient(action))
            return actor_loss(action, action_gradient, config.action_gradient_bound), (action, action_gradient)

        new_actor, (actor_value, (action, action_gradient), _) = descend(actor_adam, learner.actor, actor_objective)

        updates = learner.updates + 1
        metrics = {
            "critic_loss": critic_value, "actor_loss": actor_value, "value": values.mean(),
            "target": (target * support).sum(-1).mean(),
            "clipped_mass": categorical.clipped_mass(batch.reward, batch.discount, next_masses, support).mean(),
            "saturation": (jnp.abs(action) > 0.99).mean(),
            "action_gradient_norm": jnp.linalg.norm(action_gradient, axis=-1).mean(),
            "critic_gradient_norm": norm,
        }  # fmt: skip

        # Targets: copy actor and critic, when it is time.
        learner = Learner(
            new_actor, new_critic,
            networks.periodic_copy(learner.target_actor, new_actor.parameters, updates, config.target_period),
            networks.periodic_copy(learner.target_critic, new_critic.parameters, updates, config.target_period),
            updates,
        )  # fmt: skip
        return learner, jax.tree.map(average, metrics)

    def init(key: jax.Array) -> State:
        key, actor_key, critic_key, warmup_key = jax.random.split(key, 4)
        observation, action = jnp.zeros((1, *env.observation_space(env_params).shape)), jnp.zeros((1, action_size))
        actor_parameters = actor.init(actor_key, observation)
        critic_parameters = critic.init(critic_key, observation, action)
        learner = Learner(
            begin(actor_adam, actor_parameters), begin(critic_adam, critic_parameters),
            actor_parameters, critic_parameters, jnp.int32(0),
        )  # fmt: skip
        filled = experience.warm_up(env, env_params, warmup_key, config, normalize=config.normalize_observations)
        return State(learner, filled, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return state._replace(key=key, experience=lived), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount
            )
            learner, losses = update(state.learner, batch)
            return state._replace(key=key, learner=learner), losses

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return actor.apply(state.learner.actor.parameters, normalize(state.experience.normalizer, observation))

    def explore(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        action = act(state, observation, key)
        return jnp.clip(action + config.exploration_noise * jax.random.normal(key, action.shape), -1, 1)

    def target_policy(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        observation = normalize(state.experience.normalizer, observation)
        masses = law_of(state.learner.critic.parameters, observation, action).masses
        return Law(jnp.broadcast_to(support, masses.shape), masses)

    def export(state: State) -> dict[str, jax.Array]:
        return portable.mlp_policy(
            state.learner.actor.parameters["params"]["mlp"]["layers"], action_size, state.experience.normalizer
        )

    claim = Claim(target_policy, predict, config.discount)
    return Agent(init, step, memoryless(act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
