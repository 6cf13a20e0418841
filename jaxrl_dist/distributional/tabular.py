"""Distributional dynamic programming on finite Markov decision processes: the ground truth for everything else.

A law of returns for every state and action is a `Law` with leading axes `[states, actions]`. One application of the
Bellman operator multiplies its number of atoms; a projection brings it back to the atoms of a representation:

| projection | keeps | metric in which it does not spread laws further apart |
|---|---|---|
| `to_categorical(support)` | the mean, inside the support | Cramer |
| `to_quantiles(n)` | quantiles at midpoints | Wasserstein-infinity |
| `to_averages(fractions)` | the mean; averages of the quantile function | Wasserstein-infinity |
| `to_moments` | mean and variance | - |
| `to_particles(n)` | nothing exactly; a fresh sample each time | - |

A fine `to_categorical` is the exact law up to a bounded error (`binning_error`); `exact_return_law` grows the atoms.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.distributional import categorical, quantile
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.risk import Risk

Projection = Callable[[Law, jax.Array], Law]
"""`projection(law, key)`: any law `[..., m]` to one of fewer atoms; most ignore the key."""


class MDP(NamedTuple):
    """A finite Markov decision process: what each action in each state can lead to, `[states, actions, outcomes]`.

    An outcome that terminates pays its reward and has no successor; its `next_state` is only what an observer would
    see. Outcomes of probability 0 fill up the shorter lists.
    """

    probability: jax.Array
    next_state: jax.Array
    reward: jax.Array
    terminated: jax.Array


class Step(NamedTuple):
    """Transitions of a process, `[...]` each."""

    state: jax.Array
    action: jax.Array
    reward: jax.Array
    next_state: jax.Array
    terminated: jax.Array


def mdp_from_arrays(
    transition: np.ndarray,
    reward: np.ndarray,
    reward_masses: np.ndarray | None = None,
    terminal: np.ndarray | None = None,
) -> MDP:
    """An MDP from P(s'|s, a) and reward laws of finite support.

    Args:
        transition: `[states, actions, states]`, rows that sum to one.
        reward: atoms of the reward, broadcasting to `[states, actions, states, atoms]` from the left: `[states,
            actions]` and `[states, actions, states]` are certain rewards.
        reward_masses: their probabilities, broadcasting likewise; evenly distributed if None.
        terminal: `[states]` bool, states that end the episode when they are reached.
    """
    transition = np.asarray(transition, np.float64)
    if transition.ndim != 3 or transition.shape[0] != transition.shape[2]:
        raise ValueError(f"transition has shape {transition.shape}; it must be [states, actions, states]")
    if (transition < 0).any() or np.abs(transition.sum(-1) - 1).max() > 1e-6:
        raise ValueError(f"transition has rows from {transition.sum(-1).min()} to {transition.sum(-1).max()}, and "
                         f"{transition.min()} as smallest entry; rows must be probabilities that sum to 1")  # fmt: skip
    states, actions, _ = transition.shape
    reward = np.asarray(reward, np.float64)
    reward = reward.reshape(reward.shape + (1,) * (4 - reward.ndim))
    masses = np.full(reward.shape[-1:], 1 / reward.shape[-1]) if reward_masses is None else np.asarray(reward_masses)
    masses = masses.reshape((1,) * (4 - masses.ndim) + masses.shape) if masses.ndim == 1 else masses
    shape = (states, actions, states, reward.shape[-1])
    reward, masses = np.broadcast_to(reward, shape), np.broadcast_to(masses, shape)
    if (masses < 0).any() or np.abs(masses.sum(-1) - 1).max() > 1e-6:
        raise ValueError("reward_masses must be probabilities that sum to 1 over the last axis")
    terminal = np.zeros(states, bool) if terminal is None else np.asarray(terminal, bool)

    outcomes = (states, actions, -1)
    probability = (transition[..., None] * masses).reshape(outcomes)
    next_state = np.broadcast_to(np.arange(states)[:, None], shape).reshape(outcomes)
    # The likely outcomes first, so that those which never happen can be cut off.
    order = np.argsort(-probability, axis=-1, kind="stable")
    needed = int((probability > 0).sum(-1).max())

    def ordered(x):
        return np.take_along_axis(x, order, axis=-1)[..., :needed]

    return MDP(
        jnp.asarray(ordered(probability), jnp.float32), jnp.asarray(ordered(next_state), jnp.int32),
        jnp.asarray(ordered(reward.reshape(outcomes)), jnp.float32), jnp.asarray(ordered(terminal[next_state])),
    )  # fmt: skip


def mdp_from_outcomes(table: Sequence[Sequence[Sequence[tuple[float, int, float, bool]]]]) -> MDP:
    """An MDP from a list of (probability, next state, reward, terminated) for every state and action."""
    longest = max(len(outcomes) for actions in table for outcomes in actions)
    never = (0.0, 0, 0.0, False)
    padded = [[[*outcomes, *[never] * (longest - len(outcomes))] for outcomes in actions] for actions in table]
    columns = [np.array([[[row[i] for row in a] for a in actions] for actions in padded]) for i in range(4)]
    total = columns[0].sum(-1)
    if (columns[0] < 0).any() or np.abs(total - 1).max() > 1e-6:
        raise ValueError(f"table has probabilities that sum to {total.min()} to {total.max()}; they must sum to 1")
    if columns[1].min() < 0 or columns[1].max() >= len(table):
        raise ValueError(f"table leads to states {columns[1].min()} to {columns[1].max()}; it has {len(table)}")
    types = (jnp.float32, jnp.int32, jnp.float32, bool)
    return MDP(*(jnp.asarray(column, dtype) for column, dtype in zip(columns, types, strict=True)))


# -- expected values --------------------------------------------------------------------------------------------------


def expected(mdp: MDP, discount: float | jax.Array, values: jax.Array) -> jax.Array:
    """E[reward + discount * value of the successor]: `[states]` -> `[states, actions]`."""
    continuation = jnp.where(mdp.terminated, 0, values[mdp.next_state])
    return (mdp.probability * (mdp.reward + discount * continuation)).sum(-1)


def policy_values(mdp: MDP, policy: jax.Array, discount: float | jax.Array) -> jax.Array:
    """Action values of a policy `[states, actions]` of probabilities, by solving the linear system: same shape.

    With discount 1 every state must reach a termination.
    """
    states = mdp.probability.shape[0]
    weight = policy[..., None] * mdp.probability * ~mdp.terminated
    source = jnp.broadcast_to(jnp.arange(states)[:, None, None], weight.shape)
    chain = jnp.zeros((states, states)).at[source, mdp.next_state].add(weight)
    rewards = (policy * expected(mdp, 0.0, jnp.zeros(states))).sum(-1)
    return expected(mdp, discount, jnp.linalg.solve(jnp.eye(states) - discount * chain, rewards))


def optimal_values(mdp: MDP, discount: float | jax.Array, iterations: int = 1_000) -> jax.Array:
    """Optimal action values by value iteration, `[states, actions]`; the error shrinks by `discount` per iteration."""
    return jax.lax.fori_loop(
        0, iterations, lambda _, q: expected(mdp, discount, q.max(-1)), jnp.zeros(mdp.probability.shape[:2])
    )


# -- laws -------------------------------------------------------------------------------------------------------------


def bellman(mdp: MDP, discount: float | jax.Array, state_laws: Law) -> Law:
    """The law of reward + discount * Z(successor): `[states, n]` -> `[states, actions, outcomes * n]`, exactly."""
    going_on = discount * ~mdp.terminated
    atoms = mdp.reward[..., None] + going_on[..., None] * state_laws.atoms[mdp.next_state]
    masses = mdp.probability[..., None] * state_laws.masses[mdp.next_state]
    flat = (*mdp.reward.shape[:2], -1)
    return Law(atoms.reshape(flat), masses.reshape(flat))


def one_step(mdp: MDP, discount: float | jax.Array, values: jax.Array) -> Law:
    """The law of reward + discount * value(successor), the chance of one step only (Achab et al. 2023):
    `[states]` -> `[states, actions, outcomes]`."""
    return bellman(mdp, discount, Law(values[:, None], jnp.ones((len(values), 1))))


def under_policy(policy: jax.Array, action_laws: Law) -> Law:
    """Mixture over the actions of a policy `[states, actions]`: `[states, actions, n]` -> `[states, actions * n]`."""
    masses = policy[..., None] * action_laws.masses
    states = len(policy)
    return Law(action_laws.atoms.reshape(states, -1), masses.reshape(states, -1))


def greedy(values: jax.Array, tie_break: jax.Array | None = None, tolerance: float = 1e-5) -> jax.Array:
    """The policy `[states, actions]` that takes an action of largest value, as probabilities 0 and 1.

    Among actions within `tolerance` of the largest value, the one with the largest `tie_break`, or the first.
    """
    tied = values >= values.max(-1, keepdims=True) - tolerance
    second = jnp.zeros_like(values) if tie_break is None else tie_break
    choice = jnp.where(tied, second, -jnp.inf).argmax(-1)
    return jax.nn.one_hot(choice, values.shape[-1])


def evaluate(
    mdp: MDP,
    policy: jax.Array,
    discount: float | jax.Array,
    projection: Projection,
    iterations: int,
    key: jax.Array | None = None,
) -> Law:
    """Return laws of a policy by iterating the projected Bellman operator, `[states, actions, n]`.

    The distance to the fixed point shrinks by `discount` per iteration, in the metric of the projection.
    """
    return _iterate(mdp, discount, projection, iterations, key, lambda action_laws: policy)


def optimise(
    mdp: MDP,
    discount: float | jax.Array,
    projection: Projection,
    iterations: int,
    risk: Risk = risks.NEUTRAL,
    key: jax.Array | None = None,
) -> Law:
    """Return laws of acting greedily by the risk-adjusted value of the laws themselves, `[states, actions, n]`.

    This is what agents of the C51 family approach. For the mean its means are the optimal values; laws need not
    converge where actions tie, nor values where the risk measure is not the mean.
    """

    def policy_for(action_laws: Law) -> jax.Array:
        return greedy(risks.value(risk, action_laws), tolerance=0.0)

    return _iterate(mdp, discount, projection, iterations, key, policy_for)


def _iterate(mdp, discount, projection, iterations, key, policy_for) -> Law:
    key = jax.random.key(0) if key is None else key

    def once(action_laws: Law, index: jax.Array) -> tuple[Law, None]:
        state_laws = under_policy(policy_for(action_laws), action_laws)
        return projection(bellman(mdp, discount, state_laws), jax.random.fold_in(key, index)), None

    shape = mdp.probability.shape[:2]
    nothing = Law(jnp.zeros((*shape, 1)), jnp.ones((*shape, 1)))
    first = projection(nothing, jax.random.fold_in(key, iterations))
    return jax.lax.scan(once, first, jnp.arange(iterations))[0]


# -- projections ------------------------------------------------------------------------------------------------------


def to_categorical(support: jax.Array) -> Projection:
    """Masses on a fixed, ascending support `[n]` (`categorical.project`)."""

    def project(law: Law, key: jax.Array) -> Law:
        masses = categorical.project(law.atoms, law.masses, support)
        return Law(jnp.broadcast_to(support, masses.shape), masses)

    return project


def to_quantiles(num_quantiles: int) -> Projection:
    """Equally weighted quantiles at midpoints, the closest such law in Wasserstein-1 (QR-DQN, lemma 2)."""

    def project(law: Law, key: jax.Array) -> Law:
        return laws.equally_weighted(laws.quantile(law, quantile.midpoints(num_quantiles)))

    return project


def to_averages(fractions: jax.Array) -> Projection:
    """Averages of the quantile function between fractions 0 = f_0 < f_1 < ... < f_n = 1, with masses f_i - f_{i-1}.

    The closest law with these masses in Wasserstein-2; for (0, alpha, 1) the atoms are the left and the right average
    value at risk (Achab & Neu 2021).
    """
    masses = jnp.diff(fractions)

    def project(law: Law, key: jax.Array) -> Law:
        atoms, weights = laws.sort(law)
        shared = slice_masses(weights, fractions)
        averages = (shared * atoms[..., None, :]).sum(-1) / shared.sum(-1)
        return Law(averages, jnp.broadcast_to(masses, averages.shape))

    return project


def slice_masses(masses: jax.Array, fractions: jax.Array) -> jax.Array:
    """Of each atom, the mass between two neighbouring fractions: masses `[..., m]` of ascending atoms and fractions
    `[n + 1]` -> `[..., n, m]`."""
    upper = jnp.cumsum(masses, axis=-1)
    lower = upper - masses
    shared = jnp.minimum(upper[..., None, :], fractions[1:, None]) - jnp.maximum(
        lower[..., None, :], fractions[:-1, None]
    )
    return jnp.maximum(shared, 0)


def to_moments(law: Law, key: jax.Array) -> Law:
    """Two equally weighted atoms, one deviation to either side of the mean: a Gaussian's mean and variance, kept
    exactly."""
    mean, std = laws.mean(law), jnp.sqrt(laws.variance(law))
    return laws.equally_weighted(jnp.stack([mean - std, mean + std], axis=-1))


def to_particles(num_particles: int) -> Projection:
    """Equally weighted independent samples of the law."""

    def project(law: Law, key: jax.Array) -> Law:
        atoms, masses = (x.reshape(-1, x.shape[-1]) for x in jnp.broadcast_arrays(*law))
        upper = jnp.cumsum(masses, axis=-1)
        drawn = upper[:, -1:] * jax.random.uniform(key, (len(atoms), num_particles))
        choices = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(upper, drawn)
        particles = jnp.take_along_axis(atoms, jnp.minimum(choices, atoms.shape[-1] - 1), axis=-1)
        return laws.equally_weighted(particles.reshape(*law.masses.shape[:-1], num_particles))

    return project


def binning_error(support: jax.Array, discount: float) -> float:
    """Bound on the Wasserstein-1 distance of `evaluate` with `to_categorical` to the exact law, in units of return.

    A projection moves mass by at most half a gap on average, and what earlier ones did counts `discount` each time. It
    holds after so many iterations that discount^iterations is nothing, and for a support that clips nothing.
    """
    return float(jnp.diff(support).max() / 2 / (1 - discount))


# -- references -------------------------------------------------------------------------------------------------------


def exact_return_law(mdp: MDP, policy: np.ndarray, discount: float, state: int, action: int, steps: int) -> Law:
    """The exact law of the return over at most `steps` steps, by growing atoms in float64 (equal ones are merged).

    What is left out is at most discount^steps times the largest possible return. NumPy: `[n]`, ascending.
    """
    mdp = MDP(*(np.asarray(part) for part in mdp))
    # Reached: (state, action) to the laws of the return so far; None stands for the end.
    running, ended = {(state, action): {0.0: 1.0}}, {}
    for step in range(steps):
        following: dict = {}
        for (s, a), law in running.items():
            for k in np.flatnonzero(mdp.probability[s, a]):
                probability = float(mdp.probability[s, a, k])
                gained = discount**step * float(mdp.reward[s, a, k])
                successors = [(None, 1.0)]
                if not mdp.terminated[s, a, k]:
                    successor = int(mdp.next_state[s, a, k])
                    successors = [
                        ((successor, int(b)), float(policy[successor][b])) for b in np.flatnonzero(policy[successor])
                    ]
                for where, chance in successors:
                    into = ended if where is None else following.setdefault(where, {})
                    for value, mass in law.items():
                        total = round(value + gained, 12)
                        into[total] = into.get(total, 0.0) + mass * probability * chance
        running = following
    for law in running.values():
        for value, mass in law.items():
            ended[value] = ended.get(value, 0.0) + mass
    atoms = np.array(sorted(ended))
    return Law(atoms, np.array([ended[value] for value in atoms]))


# -- samples ----------------------------------------------------------------------------------------------------------


def sample_step(mdp: MDP, state: jax.Array, action: jax.Array, key: jax.Array) -> Step:
    """One independent outcome for each state and action; the two broadcast."""
    outcome = jax.random.categorical(key, jnp.log(mdp.probability[state, action]))
    _, next_state, reward, terminated = (field[state, action, outcome] for field in mdp)
    return Step(state, action, reward, next_state, terminated)


def sample_returns(
    mdp: MDP, policy: jax.Array, discount: float | jax.Array, key: jax.Array, *, samples: int, steps: int
) -> jax.Array:
    """Monte-Carlo returns of a policy from every state and first action, `[states, actions, samples]`."""
    states, actions, _ = mdp.probability.shape
    shape = (states, actions, samples)
    state = jnp.broadcast_to(jnp.arange(states)[:, None, None], shape)
    action = jnp.broadcast_to(jnp.arange(actions)[:, None], shape)

    def step(carry, index):
        state, action, weight, total = carry
        outcome_key, action_key = jax.random.split(jax.random.fold_in(key, index))
        taken = sample_step(mdp, state, action, outcome_key)
        total += weight * taken.reward
        weight *= discount * ~taken.terminated
        action = jax.random.categorical(action_key, jnp.log(policy[taken.next_state]))
        return (taken.next_state, action, weight, total), None

    carry = state, action, jnp.ones(shape), jnp.zeros(shape)
    return jax.lax.scan(step, carry, jnp.arange(steps))[0][-1]
