"""N-VR-PG: a normalised policy gradient of reduced variance, for rewards and for utilities of where a policy goes.

Paper: "Reinforcement Learning with General Utilities: Simpler Variance Reduction and Large State-Action Space",
Barakat, Fatkhullin, He, ICML 2023, arXiv 2306.01854.

Maximises F(lambda), any smooth function of the discounted occupancy lambda of states and actions: linear for a reward,
an entropy for exploration. By the chain rule its gradient is that of the policy for the reward r = grad F(lambda),
which depends on the policy and is estimated as well. Both estimates go on from those before, corrected by how likely
the new trajectories were before the last step; steps have a given length, so that those weights stay near 1.

    occupancy     lambda(tau) = sum over h < H of gamma^h onehot(s_h, a_h)
    gradient      g(tau, theta, r) = sum over t of (sum over h >= t of gamma^h r(s_h, a_h)) grad log pi(a_t|s_t)
    weight        w = product over h of pi(a_h|s_h; theta_{t-1}) / pi(a_h|s_h; theta_t),  tau drawn by theta_t
    estimates     lambda_t = eta lambda(tau) + (1 - eta) (lambda_{t-1} + lambda(tau) - w lambda(tau)),
                  r_t = grad F(lambda_t)
                  d_t = eta g(tau, theta_t, r_{t-1}) + (1 - eta) (d_{t-1} + g(tau, theta_t, r_{t-1})
                        - w g(tau, theta_{t-1}, r_{t-2}))
    step          theta_{t+1} = theta_t + alpha d_t / |d_t|
    sizes         eta = min(1, (2 / (t + 1))^b),  alpha = alpha_0 / (t + 1)^a;  a = b = 2/3

The discount is gamma^h, not gamma^{h-t}. The gradient has r_{t-1}, which does not know tau (at first r_0, which does).
With `--memory-exponent 0` eta is 1 and this is REINFORCE by normalised steps. There is no critic and no baseline.

Differences from the paper, whose code is not public: several trajectories per iteration, over which lambda(tau), g and
what w multiplies are averaged. H does not grow. Sums stop where an episode ends, also at a time limit, and steps after
that are not used. Occupancies are tables, for environments that show their state one-hot, and the discounted return in
all; the paper's regression on features is not here. F is taken of max(lambda_t, 0), since weights above 1 may push
entries below 0; utilities of visits see their shares, lambda over its sum. Continuous actions are Gaussian, with a
deviation that does not depend on the state, and cut to [-1, 1] where the environment takes them. Evaluation takes the
mode, which says little of a utility that wants chances: see the metric `utility`, F of the estimate.

Run:      python algorithms/policy_gradient/variance_reduced.py --env-id CartPole-v1
Expected: CartPole-v1 above 450 of 500 after 1,000 iterations, 5,000,000 steps counted; of the largest entropy of visits
          of a grid 0.99 (experiments/general_utilities).
"""

from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Clock, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, Positive, configuration
from jaxrl_dist.learning import interaction, networks, portable, rollouts, spaces
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.optimization import Trained
from jaxrl_dist.learning.policies import Choice, Gaussian

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of N-VR-PG. Floats can be swept within one program."""

    num_envs: Count = 10
    """trajectories per iteration, each from a reset; the theory has 1"""
    horizon: Count = 200
    """H, the longest trajectory"""

    utility: Literal["reward", "entropy", "barrier"] = "reward"
    """F: the discounted return; the entropy of the states that are visited; or the return and a barrier against leaving
    states out. The last two are for environments that show their state one-hot"""
    smoothing: Positive = 1e-3
    """what is added to shares of states within logarithms: a state that is never seen pays no more than -log of it"""
    barrier_weight: NonNegative = 1.0
    """weight of the barrier, the mean over states of the logarithm of their share"""
    discount: Fraction = 0.99
    """gamma, the weight of the next step"""
    step_length: NonNegative = 0.1
    """alpha_0, the length of the first step"""
    step_exponent: NonNegative = 2 / 3
    """a, how fast steps grow shorter; 0: not at all"""
    memory_exponent: NonNegative = 2 / 3
    """b, how fast the share of new trajectories in the estimates falls; 0: they are all that counts"""
    hidden: tuple[int, ...] = (64, 64)
    """widths of the hidden layers, of images those after the convolution; none: a table, if states are shown one-hot"""


PRESETS = {
    # A discount of 0.99 does not tell 300 steps from 500: lengths then wander about 400 (2 seeds).
    "CartPole-v1": {"total_steps": 5_000_000, "horizon": 500, "discount": 0.998, "hidden": (32, 32)},
    "tabular/garnet": {
        "total_steps": 1_000_000, "utility": "entropy", "hidden": (), "horizon": 50, "discount": 0.9,
        "step_length": 0.5,
    },
}  # fmt: skip

# -- Network ----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A policy, `[batch, *observation]` -> law of actions; without hidden layers one row of logits for each entry."""

    hidden: tuple[int, ...]
    outputs: int
    continuous: bool

    @nn.compact
    def __call__(self, observation: jax.Array) -> Choice | Gaussian:
        features, hidden = observation.astype(jnp.float32), self.hidden
        if features.ndim == 4 and hidden:
            features, hidden = networks.Torso(self.hidden, name="torso")(features), ()
        features = features.reshape(features.shape[0], -1)
        if self.hidden:
            # Small first outputs: a policy that is next to even.
            actor = networks.MLP((*hidden, self.outputs), nn.tanh, orthogonal=(2**0.5, 0.01), name="actor")(features)
        else:
            actor = features @ self.param("table", nn.initializers.zeros, (features.shape[-1], self.outputs))
        if not self.continuous:
            return Choice(actor)
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return Gaussian(actor, jnp.broadcast_to(log_std, actor.shape))


# -- State ------------------------------------------------------------------------------------------------------------


class Occupancy(NamedTuple):
    """What F may ask of where a policy goes: the discounted return <lambda, reward>, and lambda itself, `[states,
    actions]`, or None where F does not. Slopes of F have the same form."""

    reward: jax.Array
    table: jax.Array | None


class Memory(NamedTuple):
    """What iteration t goes on from: theta_{t-1}, d_{t-1}, lambda_{t-1}, r_{t-1}, r_{t-2} and t."""

    previous: chex.ArrayTree
    direction: chex.ArrayTree
    occupancy: Occupancy
    slope: Occupancy
    earlier_slope: Occupancy
    iteration: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on; environments stand where their next trajectories begin."""

    learner: Trained
    interaction: Interaction
    key: jax.Array


# -- Utilities and estimates ------------------------------------------------------------------------------------------


def shares(table: jax.Array) -> jax.Array:
    """The share of each state in an occupancy `[states, actions]` that is nowhere negative: `[states]`, sum 1."""
    chex.assert_rank(table, 2)
    return table.sum(-1) / jnp.maximum(table.sum(), 1e-6)  # of nothing 0


def entropy(occupancy: Occupancy, config: Config) -> jax.Array:
    share = shares(occupancy.table)
    return -(share * jnp.log(share + config.smoothing)).sum()


def barrier(occupancy: Occupancy, config: Config) -> jax.Array:
    share = shares(occupancy.table)
    return occupancy.reward + config.barrier_weight * jnp.log(share + config.smoothing).mean()


UTILITIES = {"reward": lambda occupancy, config: occupancy.reward, "entropy": entropy, "barrier": barrier}
"""F of an occupancy that is nowhere negative, to be maximised; all but the first are given a table."""


class Trajectories(NamedTuple):
    """What the update sees, leaves `[horizon, num_envs, ...]`; steps after the end of an episode are not `alive`."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    alive: jax.Array


def discounts(lived: Trajectories, discount: float | jax.Array) -> jax.Array:
    """gamma^h while a trajectory lives, then 0: `[horizon, num_envs]`."""
    chex.assert_rank(lived.reward, 2)
    chex.assert_equal_shape([lived.reward, lived.alive])
    return lived.alive * discount ** jnp.arange(len(lived.alive), dtype=lived.reward.dtype)[:, None]


def visits(lived: Trajectories, discount: float | jax.Array, num_actions: int) -> Occupancy:
    """lambda(tau) of each trajectory, leaves `[num_envs, ...]`; the table, for actions of so many, or None for 0."""
    weight, table = discounts(lived, discount), None
    if num_actions:
        taken = jax.nn.one_hot(lived.action, num_actions, dtype=weight.dtype)
        table = jnp.einsum("hn,hns,hna->nsa", weight, lived.observation, taken)
    return Occupancy((weight * lived.reward).sum(0), table)


def to_go(slope: Occupancy, lived: Trajectories, discount: float | jax.Array) -> jax.Array:
    """The sum over h >= t of gamma^h r(s_h, a_h) at each step t, `[horizon, num_envs]`, for r by a slope of F."""
    pay = slope.reward * lived.reward
    if slope.table is not None:
        taken = jax.nn.one_hot(lived.action, slope.table.shape[1], dtype=pay.dtype)
        pay += jnp.einsum("hns,hna,sa->hn", lived.observation, taken, slope.table)
    return jax.lax.cumsum(discounts(lived, discount) * pay, reverse=True)


def importance_weight(log_density: jax.Array, log_before: jax.Array, alive: jax.Array) -> jax.Array:
    """w, `[num_envs]`; log densities `[horizon, num_envs]` by the policy that drew, and by the one before."""
    chex.assert_equal_shape([log_density, log_before, alive])
    return jnp.exp((alive * (log_before - log_density)).sum(0))


def share_of_new(iteration: jax.Array, exponent: float | jax.Array) -> jax.Array:
    """eta, the share of new trajectories in the estimates of iteration 0, 1, ...; 1 in the first two."""
    return jnp.minimum(1.0, (2 / (iteration + 1)) ** exponent)


def go_on(estimate: chex.ArrayTree, now: chex.ArrayTree, before: chex.ArrayTree, eta: jax.Array) -> chex.ArrayTree:
    """From an estimate for theta_{t-1} to one for theta_t, by what new trajectories say of the one and the other."""
    return jax.tree.map(lambda e, n, b: eta * n + (1 - eta) * (e + n - b), estimate, now, before)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """N-VR-PG on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    continuous = spaces.kind_of(spaces.spaces_of(env, env_params)[0]) == "continuous"
    outputs = (spaces.continuous_action_size if continuous else spaces.discrete_action_count)(env, env_params)
    network = Network(config.hidden, outputs, continuous)
    shape = env.observation_space(env_params).shape
    utility = UTILITIES[config.utility]
    table_of = 0 if config.utility == "reward" else outputs
    if table_of:
        states = getattr(env, "num_states", getattr(env, "n", None))
        needed = f"those of envs.tabular, or numbered ones, for --utility {config.utility}"
        shown = not continuous and shape == (states,)
        spaces.require_environment(shown, env, "states are not shown one-hot", needed)

    def update(learner: Trained, lived: Trajectories) -> tuple[Trained, dict[str, jax.Array]]:
        """One step, by the recursion for occupancy and gradient."""
        parameters, memory = learner

        def log_densities(parameters: chex.ArrayTree) -> jax.Array:
            return jax.vmap(lambda x, action: network.apply(parameters, x).log_density(action))(*lived[:2])

        # Weights: of the same actions, in the policy before the last step.
        log_density, pull = jax.vjp(log_densities, parameters)
        log_before, pull_before = jax.vjp(log_densities, memory.previous)
        weight = importance_weight(log_density, log_before, lived.alive)
        iteration = memory.iteration.astype(jnp.float32)
        eta = share_of_new(iteration, config.memory_exponent)

        # Occupancy, and the slope of F there.
        visited = visits(lived, config.discount, table_of)
        now = jax.tree.map(lambda x: x.mean(0), visited)
        before = jax.tree.map(lambda x: jnp.tensordot(weight, x, 1) / config.num_envs, visited)
        occupancy = go_on(memory.occupancy, now, before, eta)
        table = None if occupancy.table is None else jnp.maximum(occupancy.table, 0)
        reached, slope = jax.value_and_grad(utility)(occupancy._replace(table=table), config)

        # Gradient: by slopes that do not know these trajectories, but for the first ones, before which there is none.
        past = memory.slope, memory.earlier_slope
        last, earlier = jax.tree.map(lambda old, new: jnp.where(iteration == 0, new, old), past, (slope, slope))
        gain, gain_before = (lived.alive * to_go(x, lived, config.discount) / config.num_envs for x in (last, earlier))
        (gradient,), (gradient_before,) = pull(gain), pull_before(weight * gain_before)
        direction = go_on(memory.direction, gradient, gradient_before, eta)

        # Step: of a given length, upwards.
        norm = optax.tree.norm(direction)
        length = config.step_length / (iteration + 1) ** config.step_exponent
        stepped = jax.tree.map(lambda x, d: x + length / jnp.maximum(norm, 1e-30) * d, parameters, direction)
        memory = Memory(parameters, direction, occupancy, slope, last, memory.iteration + 1)
        return Trained(stepped, memory), {
            "loss": -(gain * log_density).sum(), "utility": reached,
            "gradient_norm": optax.tree.norm(gradient), "direction_norm": norm, "share_of_new": eta,
            "smallest_weight": weight.min(), "largest_weight": weight.max(),
        }  # fmt: skip

    def init(key: jax.Array) -> State:
        key, network_key, start_key = jax.random.split(key, 3)
        parameters = network.init(network_key, jnp.zeros((1, *shape)))
        nothing = Occupancy(jnp.zeros(()), jnp.zeros((*shape, outputs)) if table_of else None)
        memory = Memory(parameters, jax.tree.map(jnp.zeros_like, parameters), nothing, nothing, nothing, jnp.int32(0))
        now = interaction.start(env, env_params, start_key, config.num_envs)
        return State(Trained(parameters, memory), now, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, start_key = jax.random.split(state.key, 3)

        # Trajectories, each from a reset. What follows the end of its episode is not looked at.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            law = network.apply(state.learner.parameters, observation)
            action = law.sample(key)
            return taken(action), memory, (action, law.entropy())

        after, (seen, (action, entropy)), _ = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.horizon, follow
        )
        done = seen.terminated | seen.truncated
        alive = jnp.cumsum(done, 0) - done.astype(jnp.int32) == 0
        lived = Trajectories(seen.observation, action, seen.reward, alive)
        learner, metrics = update(state.learner, lived)

        now = interaction.start(env, env_params, start_key, config.num_envs)
        now = now._replace(largest_reward=after.largest_reward)
        episodes = {
            "episode_return": average((alive * seen.reward).sum(0), done.any(0)),
            "episode_length": average(alive.sum(0), done.any(0)), "entropy": average(entropy, alive),
        }  # fmt: skip
        return State(learner, now, key), episodes | jax.tree.map(average, metrics)

    def taken(action: jax.Array) -> jax.Array:
        return jnp.clip(action, -1, 1) if continuous else action

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return taken(network.apply(state.learner.parameters, observation).mode())

    def export(state: State) -> dict[str, Any]:
        layers = state.learner.parameters["params"]
        if not config.hidden:
            layers = {"actor": {"layers": {"kernel_0": layers["table"][None], "bias_0": jnp.zeros((1, outputs))}}}
        return portable.actor_policy(layers, outputs, None, "tanh", continuous=continuous, squash=False)

    return Agent(init, step, memoryless(act), Clock(1, config.num_envs * config.horizon), export=export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
