"""FLE: fitted likelihood estimation, the law of a policy's return from logged data, by maximum likelihood.

Paper: "Distributional Offline Policy Evaluation with Predictive Error Guarantees", Wu, Uehara, Sun, ICML 2023, arXiv
2302.09456.

Fitted Q evaluation for whole laws: go backwards through the steps, make a sample of the return of every logged
transition with the model of the step after it, and fit a conditional density to these samples. Any model that can be
trained by maximum likelihood and sampled from will do, and returns may be vectors. The paper bounds the error in total
variation for a finite horizon, in Wasserstein distance for discounted returns.

    finite horizon   for h = H-1, ..., 0:  y = r + (1 - terminated) z',  z' ~ f_{h+1}(s', a'),  a' ~ policy(s')
                     f_h = argmax over f of  sum over the transitions of step h of  log f(y | s, a)
    discounted       for t = 1, 2, ...:    y = r + gamma (1 - terminated) z',  z' ~ f_{t-1}(s', a'),  f_0 = 0 surely
                     f_t = argmax over f of  sum over batch t of  log f(y | s, a)
    mixture          f(y | s, a) = sum over k of  w_k N(y; m_k, S_k), all of a network (`distributional.mixture`)

One z' is drawn per transition, once, with the model that is no longer trained. Both iterations are `fit_backwards`.

Two baselines share the network and the fit and differ in target and loss. `categorical`: masses on a grid, the target
is the whole next law, shifted and projected (C51). `quantile`: quantile regression on all shifted next quantiles
(QR-DQN). Both are for scalar returns. When they are sampled an atom is spread over its cell, a quantile law is
interpolated: atoms have no density that could be compared.

Differences from the paper: the mixture's likelihood is a logsumexp, not the logarithm of a clipped sum; covariances are
factored, so that none is indefinite; deviations stay within exp(-5) and exp(2), smoothly; means start spread out; the
step size falls to 0 along a cosine; actions are one-hot; f_h starts from a new network. The paper's second generative
model, a diffusion, is left out.

Run:      python algorithms/dynamic_programming/fitted_likelihood.py --samples 1000
Expected: total variation, W1 and success probability on the combination lock: experiments/fitted_likelihood.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from jaxrl_dist.configuration import (
    Count,
    Fraction,
    Layers,
    Natural,
    NonNegative,
    Positive,
    Real,
    configuration,
    require,
)
from jaxrl_dist.distributional import categorical, quantile
from jaxrl_dist.distributional.metrics import total_variation, wasserstein_1
from jaxrl_dist.distributional.mixture import Mixture, mixture_log_likelihood, mixture_of, mixture_size, sample_mixture
from jaxrl_dist.envs import comb_lock
from jaxrl_dist.envs.comb_lock import CombLock, Transitions
from jaxrl_dist.learning import networks
from jaxrl_dist.learning.optimization import begin, descend
from jaxrl_dist.records.statistics import bootstrap_interval

BINS = {1: np.linspace(-1.5, 1.5, 71), 2: np.linspace(-4, 4, 31)}  # by dimension of the return, per axis

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of FLE on the combination lock."""

    model: str = "mixture"
    """what is fitted: mixture, categorical or quantile"""
    dimension: Count = 1
    """of the returns, 1 or 2; categorical and quantile are for 1"""
    samples: Count = 1_000
    """logged transitions for every step and hidden state"""
    correct: Fraction = comb_lock.CORRECT
    """probability with which the evaluated policy acts correctly"""
    seeds: Count = 3
    """independent data sets and fits, side by side"""
    seed: Natural = 0
    """of the first of them"""
    draws: Count = 10_000
    """samples of every fitted law, to measure it by"""

    hidden: Layers = (32,)
    """widths of the hidden layers"""
    iterations: Count = 2_000
    """gradient steps in the fit of one step"""
    batch_size: Count = 500
    """transitions per gradient step"""
    learning_rate: NonNegative = 1e-3
    """step size of Adam at the start of a fit"""

    components: Count = 10
    """Gaussians of a mixture"""
    initial_spread: NonNegative = 1.0
    """standard deviation of the means at the start of a fit, in units of return"""
    num_atoms: Count = 100
    """atoms of a categorical or a quantile law"""
    v_min: Real = -1.5
    """lowest atom of a categorical law, in units of return"""
    v_max: Real = 1.5
    """highest one"""
    kappa: Positive = 0.05
    """threshold of the quantile Huber loss, in units of return"""


# -- Models -----------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What turns the outputs of a network into laws, and transitions into what the laws are fitted to."""

    outputs: int
    """Numbers per law."""
    target: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    """`target(key, reward [batch, dimension], discount [batch], next outputs [batch, outputs])` -> `[batch, ...]`"""
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    """`loss(outputs [batch, outputs], target)` -> `[batch]`"""
    sample: Callable[[jax.Array, jax.Array], jax.Array]
    """`sample(key, outputs [batch, outputs])` -> `[batch, dimension]`, one sample of every law"""


def gaussian_mixture(config: Config) -> Model:
    """The paper's: one sample of the next law per transition, and its likelihood."""

    def laws(head: jax.Array) -> Mixture:
        return mixture_of(head, config.components, config.dimension, config.initial_spread)

    def sample(key, head):
        return sample_mixture(key, laws(head))

    def target(key, reward, discount, next_head):
        chex.assert_shape(reward, (len(discount), config.dimension))
        return reward + discount[:, None] * sample(key, next_head)

    def loss(head, target):
        return -mixture_log_likelihood(laws(head), target)

    return Model(mixture_size(config.components, config.dimension), target, loss, sample)


def categorical_law(config: Config) -> Model:
    """Masses on a grid, fitted to the projection of the whole next law."""
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)

    def target(key, reward, discount, next_head):
        chex.assert_shape([reward, discount[:, None]], (len(next_head), 1))
        return categorical.project_return(reward[:, 0], discount, jax.nn.softmax(next_head), support)

    def loss(head, target):
        chex.assert_equal_shape([head, target])
        return categorical.cross_entropy(target, head)

    def sample(key, head):
        atom_key, place_key = jax.random.split(key)
        place = jax.random.uniform(place_key, head.shape[:1], minval=-0.5, maxval=0.5)
        return (support[jax.random.categorical(atom_key, head)] + place * (support[1] - support[0]))[:, None]

    return Model(config.num_atoms, target, loss, sample)


def quantile_law(config: Config) -> Model:
    """Equally weighted atoms, fitted by quantile regression to all atoms of the next law."""
    fractions = quantile.midpoints(config.num_atoms)

    def target(key, reward, discount, next_head):
        chex.assert_shape([reward, discount[:, None]], (len(next_head), 1))
        return reward + discount[:, None] * next_head

    def loss(head, target):
        return quantile.quantile_huber_loss(head, target, fractions, kappa=config.kappa, over_predicted="mean")

    def sample(key, head):
        wanted = jax.random.uniform(key, head.shape[:1])
        return jax.vmap(jnp.interp, in_axes=(0, None, 0))(wanted, fractions, jnp.sort(head, axis=-1))[:, None]

    return Model(config.num_atoms, target, loss, sample)


MODELS = {"mixture": gaussian_mixture, "categorical": categorical_law, "quantile": quantile_law}

# -- Fitted likelihood estimation -------------------------------------------------------------------------------------


def inputs_of(observation: jax.Array, action: jax.Array, num_actions: int) -> jax.Array:
    """Observations with actions one-hot, `[batch, observation + actions]`."""
    return jnp.concatenate([observation, jax.nn.one_hot(action, num_actions)], axis=-1)


def network_of(config: Config, model: Model) -> networks.MLP:
    """The network from `inputs_of` to `[batch, outputs]`."""
    return networks.MLP((*config.hidden, model.outputs))


def fit(key: jax.Array, config: Config, model: Model, inputs: jax.Array, target: jax.Array):
    """A new network fitted to constant targets: inputs `[samples, ...]`, target `[samples, ...]` -> its parameters."""
    chex.assert_equal_shape_prefix([inputs, target], 1)
    network = network_of(config, model)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.iterations))
    network_key, batch_key = jax.random.split(key)

    def update(trained, index):
        rows = jax.random.randint(jax.random.fold_in(batch_key, index), (config.batch_size,), 0, len(inputs))
        x, y = inputs[rows], target[rows]
        trained, _ = descend(optimizer, trained, lambda fitted: (model.loss(network.apply(fitted, x), y).mean(), None))
        return trained, None

    trained = begin(optimizer, network.init(network_key, inputs[:1]))
    return jax.lax.scan(update, trained, jnp.arange(config.iterations))[0].parameters


def targets(key, config: Config, model: Model, parameters, batch: Transitions, discount, num_actions: int) -> jax.Array:
    """What one batch of transitions is fitted to, drawn once with the model of the step after it: `[samples, ...]`.

    discount: scalar, 0 where there is no such model. (`generate_next_val` of the authors' code.)
    """
    next_inputs = inputs_of(batch.next_observation, batch.next_action, num_actions)
    next_head = network_of(config, model).apply(parameters, next_inputs)
    return model.target(key, batch.reward, discount * (1.0 - batch.terminated), next_head)


def fit_backwards(key: jax.Array, config: Config, model: Model, batches: Transitions, discount, num_actions: int):
    """Fit batches `[steps, samples, ...]` one after the other, each to samples made with the model before it.

    Finite horizon: the steps in reverse order, with discount 1. Discounted: one fresh batch per iteration. Returns the
    parameters of all models, leading axis `[steps]`, in the order of the batches.
    """

    def one(parameters, numbered):
        index, batch = numbered
        target_key, fit_key = jax.random.split(jax.random.fold_in(key, index))
        # Before the first fit the law is 0 surely: the parameters that stand for no model must not matter.
        bootstrap = jnp.where(index > 0, discount, 0.0)
        target = targets(target_key, config, model, parameters, batch, bootstrap, num_actions)
        fitted = fit(fit_key, config, model, inputs_of(batch.observation, batch.action, num_actions), target)
        return fitted, fitted

    steps = batches.action.shape[0]
    inputs = inputs_of(batches.observation[0, :1], batches.action[0, :1], num_actions)
    nothing = network_of(config, model).init(jax.random.fold_in(key, steps), inputs)
    return jax.lax.scan(one, nothing, (jnp.arange(steps), batches))[1]


# -- On the combination lock ------------------------------------------------------------------------------------------


def estimate(key: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """One run: draw data, fit, and sample the laws of (latent 0, action 0) at all steps.

    Returns the samples `[horizon, draws, dimension]` and the network's outputs at step 0 `[draws, outputs]`.
    """
    env, model = CombLock(), MODELS[config.model](config)
    data_key, fit_key, observation_key, sample_key = jax.random.split(key, 4)
    data = comb_lock.offline_data(
        env, data_key, samples=config.samples, correct=config.correct, dimension=config.dimension
    )
    reverse = jax.tree.map(lambda x: x[::-1], data)
    parameters = fit_backwards(fit_key, config, model, reverse, 1.0, env.num_actions)
    parameters = jax.tree.map(lambda x: x[::-1], parameters)

    first = jnp.zeros((env.horizon, config.draws), jnp.int32)
    observation = env.features(observation_key, first, jnp.arange(env.horizon)[:, None])
    heads = jax.vmap(network_of(config, model).apply)(parameters, inputs_of(observation, first, env.num_actions))
    samples = model.sample(sample_key, heads.reshape(-1, model.outputs))
    return samples.reshape(env.horizon, config.draws, -1), heads[0]


def errors(samples: np.ndarray, success: float) -> dict[str, float]:
    """How far samples `[n, dimension]` are from the return of a policy that succeeds with a given probability.

    Returns binned total variation, W1 (of the distance from the origin if the return is a vector), both against 100,000
    true samples, and the share of samples that look like a success.
    """
    dimension = samples.shape[-1]
    truth = np.asarray(comb_lock.sample_returns(jax.random.key(0), success, 100_000, dimension))
    lines = [x[:, 0] if dimension == 1 else np.linalg.norm(x, axis=-1) for x in (np.asarray(samples), truth)]
    return {
        "total_variation": total_variation(samples, truth, BINS[dimension]),
        "wasserstein_1": float(wasserstein_1(*lines)),
        "success": float((lines[0] > (0 if dimension == 1 else comb_lock.RING_RADIUS / 2)).mean()),
    }


# -- Command line -----------------------------------------------------------------------------------------------------


def solve(config: Config, console) -> None:
    """Fit the laws of the combination lock from logged data and print their distance from the truth."""
    model, dimension = config.model, config.dimension
    require(model in MODELS, f"--model is {model!r}; it must be one of {', '.join(MODELS)}")
    most = 2 if model == "mixture" else 1
    require(dimension <= most, f"--dimension is {dimension}; it must be at most {most} for --model {model}")
    if model == "categorical":
        categorical.support(config.v_min, config.v_max, config.num_atoms)
    success = comb_lock.success_probability(config.correct, horizon=CombLock().horizon)
    seeds = np.arange(config.seed, config.seed + config.seeds)
    keys = jax.vmap(jax.random.key)(seeds)
    samples, heads = jax.device_get(jax.jit(jax.vmap(estimate, in_axes=(0, None)))(keys, config))
    # Other returns of the same law: what is left of the errors when the model is perfect.
    truth = np.asarray(comb_lock.sample_returns(jax.random.key(1), success, config.draws, dimension))
    rows = [errors(run[0], success) for run in samples]
    if model == "mixture" and dimension == 1:
        laws = jax.jit(mixture_of, static_argnums=(1, 2))(heads, config.components, 1, config.initial_spread)
        for row, likelihood in zip(rows, jax.jit(mixture_log_likelihood)(laws, truth).mean(-1), strict=True):
            row["log_likelihood"] = float(likelihood)

    table = Table("seed", *rows[0], title=f"{model}: return from step 0 of the combination lock")
    for seed, row in zip(seeds, rows, strict=True):
        table.add_row(str(seed), *(f"{value:.3f}" for value in row.values()))
    if config.seeds > 1:
        table.add_row("mean, 95 %", *(_mean([row[name] for row in rows]) for name in rows[0]), style="bold")
    perfect = errors(truth, success) | {"success": success}
    if "log_likelihood" in rows[0]:
        perfect["log_likelihood"] = comb_lock.best_log_likelihood(success)
    table.add_row("truth", *(f"{value:.3f}" for value in perfect.values()), style="dim")
    console.print(table)


def _mean(values: list[float]) -> str:
    low, high = bootstrap_interval(values, statistic=np.mean)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.solve(Config, solve)
