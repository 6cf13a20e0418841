"""BC: Behaviour Cloning, and %BC: of the best episodes alone.

The floor of offline learning, with the protocol of "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", Fu,
Kumar, Nachum, Tucker, Levine, arXiv 2004.07219, and the defaults of CORL's `any_percent_bc`.

The policy is fitted to the actions in the data; rewards, successors and ends play no part. %BC looks at rewards once:
it keeps the `--best-percent` of the episodes with the largest returns, at least one, and clones those.

    deterministic   mean over batch and actions of (tanh f(s) - a)^2
    gaussian        -log N(a; tanh f(s), diag exp(2 log_std)), log_std free of the state, in [-5, 2]
    squashed        -log density of a = tanh(u), u ~ N(f(s), diag exp(2 log_std))
    choice          -log softmax f(s)[a], wherever actions are a choice

Differences from CORL's code: it has the deterministic head alone; observations are cut to ±10 deviations, and a tiny
variance instead of 1e-3 is added to theirs. Actions at the bounds are drawn in by 1e-5 for the squashed head, where
their density is infinite.

Run:      jaxrl-dist collect jaxrl_dist.envs.controllers:pendulum --env-id Pendulum-v1 --random 0.6 --out medium.npz
          python algorithms/offline/bc.py --env-id Pendulum-v1 --dataset medium.npz
Expected: Pendulum-v1, the data's own return; no committed study yet.
"""

from typing import Annotated, Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Clock, memoryless
from jaxrl_dist.configuration import Bounds, Count, Layers, NonNegative, configuration
from jaxrl_dist.learning import datasets, networks, normalization, portable
from jaxrl_dist.learning.interaction import Average, Transition, average
from jaxrl_dist.learning.normalization import RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.policies import Choice, Gaussian, SquashedGaussian
from jaxrl_dist.learning.spaces import continuous_action_size, discrete_action_count, kind_of, spaces_of

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of BC; floats can be swept within one program."""

    updates_per_iteration: Count = 1
    """gradient updates per iteration"""
    batch_size: Count = 256
    """rows of the data per update"""
    normalize_observations: bool = True
    """normalise observations by the mean and variance of the data"""
    best_percent: Annotated[int, Bounds(1, 100)] = 100
    """share of the episodes that is cloned, those with the largest returns"""

    head: Literal["deterministic", "gaussian", "squashed"] = "deterministic"
    """what is fitted to continuous actions; see above"""
    learning_rate: NonNegative = 3e-4
    """step size of Adam"""
    hidden: Layers = (256, 256)
    """widths of the hidden layers"""


# Sizes for a CPU; total_steps are updates.
SMALL = {"total_steps": 8_000, "batch_size": 128, "hidden": (64, 64)}
PRESETS = {"Pendulum-v1": SMALL, "CartPole-v1": SMALL}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """Law of actions, `[batch, *observation]` -> `Choice`, `Gaussian` or `SquashedGaussian`."""

    hidden: tuple[int, ...]
    outputs: int
    head: str

    @nn.compact
    def __call__(self, observation: jax.Array) -> Choice | Gaussian | SquashedGaussian:
        features, hidden = observation.astype(jnp.float32), self.hidden
        if features.ndim > 2:
            features, hidden = networks.Torso(self.hidden, name="torso")(features), ()
        outputs = networks.MLP((*hidden, self.outputs), name="actor")(features)
        if self.head == "choice":
            return Choice(outputs)
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        log_std = jnp.broadcast_to(jnp.clip(log_std, -5, 2), outputs.shape)
        if self.head == "squashed":
            return SquashedGaussian(outputs, log_std)
        return Gaussian(jnp.tanh(outputs), log_std)


# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    normalizer: RunningStatistics | None
    best: datasets.Best | None
    """the rows of the best episodes; None: all"""
    key: jax.Array


# -- Loss -------------------------------------------------------------------------------------------------------------


def loss_of(policy: Choice | Gaussian | SquashedGaussian, action: jax.Array, head: str) -> jax.Array:
    """Squared error of the policy's modes, or minus the log density of `[batch, *action]`, mean over the batch."""
    chex.assert_equal_shape([policy.mode(), action])
    if head == "deterministic":
        return ((policy.mode() - action) ** 2).mean()
    return -policy.log_density(action).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params, data: Transition) -> Agent:
    """BC of a dataset; called inside the trace, so that the floats of `config` may be tracers."""
    continuous = kind_of(spaces_of(env, env_params)[0]) == "continuous"
    outputs = (continuous_action_size if continuous else discrete_action_count)(env, env_params)
    head = config.head if continuous else "choice"
    actor = Actor(config.hidden, outputs, head)
    optimizer = optax.adam(config.learning_rate)

    def update(learner: Trained, observation: jax.Array, action: jax.Array) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step on a batch."""

        def objective(parameters):
            policy = actor.apply(parameters, observation)
            return loss_of(policy, action, head), jnp.abs(policy.mode() - action).mean()

        learner, (loss, error, norm) = descend(optimizer, learner, objective)
        return learner, {"loss": loss, "action_error": error, "gradient_norm": norm}

    def init(key: jax.Array) -> State:
        key, actor_key = jax.random.split(key)
        observation = jnp.asarray(data.observation)
        normalizer = normalization.of(observation) if config.normalize_observations else None
        best = datasets.best_episodes(data, config.best_percent) if config.best_percent < 100 else None
        return State(begin(optimizer, actor.init(actor_key, observation[:1])), normalizer, best, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def learn(state: State, _):
            key, batch_key = jax.random.split(state.key)
            batch = datasets.draw(data, batch_key, config.batch_size, state.best)
            learner, metrics = update(state.learner, normalize(state.normalizer, batch.observation), batch.action)
            return state._replace(learner=learner, key=key), metrics

        state, metrics = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(average, metrics)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return actor.apply(state.learner.parameters, normalize(state.normalizer, observation)).mode()

    def export(state: State) -> dict[str, Any]:
        parameters = state.learner.parameters["params"]
        return portable.actor_policy(parameters, outputs, state.normalizer, continuous=continuous)

    return Agent(init, step, memoryless(act), Clock(config.updates_per_iteration), export=export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
