"""D-eta-N: quantile regression DQN with a stock, for CVaR, requested returns and other utilities of the whole return.

Paper: "Optimizing Return Distributions with Distributional Dynamic Programming", Avila Pires, Rowland, Borsa, Guo,
Khetarpal, Barreto, Abel, Munos, Dabney, JMLR 2025, arXiv 2501.13028, section 6. QR-DQN: arXiv 1710.10044.

The observation ends with a stock c, which says how much has been gained already or is still owed. The network holds the
law of the rest of the return, G(s, c, a), and actions maximise the expected utility of c + G; that optimises E f(c_0 +
G) of the whole return for the initial stock c_0, which a risk measure in the greedy step does not. One network serves
all initial stocks: the choice of c_0 sets the risk level, or the return that is asked for.

    law           G(s, c, a) = theta_i(s, c, a) with probability 1/N,  tau_i = (2i - 1) / 2N
    stock         c' = (c + r) / gamma
    target        y_j = r + gamma (1 - terminated) theta_target_j(s', c', a*)
                  a* = argmax over a of mean_j f(c' + theta_target_j(s', c', a))
    loss          mean of sum over i of mean over j of |tau_i - 1{y_j < theta_i}| huber_kappa(y_j - theta_i) / kappa
    target copy   theta_target <- theta, once every `target_period` updates
    acting        c_0 drawn evenly from a range, then epsilon-greedy for mean_j f(c + theta_j(s, c, a))
    ties          utilities within 1e-5 of the best are equal (`envs.stock.TIE`); of these the larger mean is taken,
                  here as in targets: with min(x, 0) all actions tie that cannot fall short
    CVaR          c_0 = argmax over c of -c + (1 / tau) max over a of mean_j min(c + theta_j(s_0, c, a), 0)

The stock is the environment's: `envs/stock.py` appends it to vector observations, so replay, evaluation and checkpoints
are those of any other agent, and `env_params.replace(lowest_stock=c, highest_stock=c)` evaluates from one stock. Since
its dynamics are known, a transition is as good with any other stock (`hindsight`): a sampled one gets that of its
neighbour in the batch, an independent draw from all that the replay holds, and c' is computed anew.

Differences from the paper: hindsight, the loss, ties, sizes and schedules are our choice, its details being unknown to
us; vectors instead of Atari's images. `--num-steps` n > 1 replaces r and gamma by the n-step return and gamma^n.

Run:      python algorithms/value_based/eta_dqn.py --env-id stock/gamble
          python algorithms/value_based/eta_dqn.py --env-id stock/bridge --env-options lowest_stock=-10 highest_stock=15
Expected: the policies of dynamic programming from every initial stock: experiments/cvar_frontier.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, Layers, NonNegative, Positive, configuration, require
from jaxrl_dist.distributional import law, quantile
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, networks, policies, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.learning.spaces import discrete_action_count, require_environment

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(Settings):
    """Settings of D-eta-N. Floats can be swept within one compiled program."""

    num_envs: Count = 8
    updates_per_iteration: Count = 2
    warmup_steps: Count = 5_000
    replay_capacity: Count = 100_000
    batch_size: Count = 64
    num_steps: Count = 1
    """steps of reward in a target before it bootstraps"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return; the stock's must be the same (--env-options discount=...)"""
    target_period: Count = 1_000
    """updates between two copies of the network into the target network"""
    learning_rate: NonNegative = 2.5e-4
    """step size of Adam"""
    adam_epsilon: Positive = 3.125e-4
    """what Adam adds to its denominator"""
    epsilon_start: Fraction = 1.0
    """probability of a random action at the first step"""
    epsilon_end: Fraction = 0.05
    """probability of a random action from `exploration_steps` on"""
    exploration_steps: Count = 50_000
    """environment steps in which that probability falls, warm-up included"""

    hidden: Layers = (128, 128)
    """widths of the hidden layers, after the convolution if observations are images"""
    num_quantiles: Count = 200
    """quantiles per action"""
    kappa: NonNegative = 1.0
    """threshold of the Huber function in units of return; 0 is plain quantile regression"""
    utility: str = "shortfall"
    """f, whose mean of stock plus return is maximised, in targets, acting and evaluation: mean, shortfall (CVaR),
    surplus, target (a requested return), homeostasis or threshold"""
    hindsight: bool = True
    """learn from every transition as if it had happened with another stock of the replay"""
    stock_scale: Positive = 10.0
    """units of return that are 1 at the network's input for the stock"""


# Environments with a stock; the range of the initial stocks covers minus the returns that can be asked for.
PRESETS = {
    "stock/gamble": {
        "total_steps": 110_000, "env_options": ("discount=1.0", "lowest_stock=-9.0", "highest_stock=1.0"),
        "discount": 1.0, "updates_per_iteration": 1, "warmup_steps": 2_000, "batch_size": 128, "target_period": 200,
        "learning_rate": 1e-3, "adam_epsilon": 1e-6, "exploration_steps": 20_000, "epsilon_end": 0.3,
        "hidden": (64, 64), "num_quantiles": 32, "kappa": 0.1, "stock_scale": 8.0,
    },
    "stock/bridge": {
        "total_steps": 120_000, "env_options": ("lowest_stock=-10.0", "highest_stock=15.0"),
        "updates_per_iteration": 1, "warmup_steps": 2_000, "batch_size": 128, "target_period": 200,
        "learning_rate": 1e-3, "adam_epsilon": 1e-6, "exploration_steps": 20_000, "epsilon_end": 0.3,
        "hidden": (64, 64), "num_quantiles": 64, "kappa": 0.1,
    },
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Quantiles of every action, `[batch, features + stock]` -> `[batch, actions, quantiles]`."""

    hidden: tuple[int, ...]
    num_actions: int
    num_quantiles: int
    stock_scale: float

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        observation = observation.at[:, -1].divide(self.stock_scale)
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        return networks.ActionHead(self.hidden[-1], self.num_actions, self.num_quantiles, name="head")(features)


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


def with_stock(batch: Batch, stock: jax.Array) -> Batch:
    """The same transitions, had the stock before them been another one, `[batch]`.

    The stock after them follows from reward and discount of all their steps; after a termination it plays no part.
    """
    chex.assert_rank([batch.observation, batch.next_observation], 2)
    chex.assert_shape([stock, batch.reward, batch.discount], (len(batch.observation),))
    # c' = (c + R) / gamma^n: the batch has the n-step return R, and gamma^n as its discount.
    after = (stock + batch.reward) / jnp.where(batch.discount > 0, batch.discount, 1)
    return batch._replace(
        observation=batch.observation.at[:, -1].set(stock),
        next_observation=batch.next_observation.at[:, -1].set(after),
    )


def target_quantiles(batch: Batch, next_quantiles: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted quantiles, `[batch, quantiles]` -> `[batch, quantiles]`."""
    chex.assert_rank(next_quantiles, 2)
    chex.assert_shape([batch.reward, batch.discount], (len(next_quantiles),))
    return batch.reward[:, None] + batch.discount[:, None] * next_quantiles


def loss_of(quantiles: jax.Array, target: jax.Array, kappa: float | jax.Array) -> jax.Array:
    """Mean quantile Huber loss: quantiles of the actions taken, `[batch, quantiles]`, on `[batch, targets]`."""
    chex.assert_rank([quantiles, target], 2)
    chex.assert_equal_shape_prefix([quantiles, target], 1)
    fractions = quantile.midpoints(quantiles.shape[-1])
    # QR-DQN's (arXiv 1710.10044): summed over i, averaged over j, divided by kappa.
    return quantile.quantile_huber_loss(quantiles, target, fractions, kappa=kappa, over_predicted="sum").mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def checked_discount(config: Config, env, env_params) -> float | jax.Array:
    """gamma, after a check that the environment has a stock and divides it by the same number.

    Where one of the two is traced, and so unknown before the run, gamma is not a number if they differ: that stops the
    run, where a stock of another gamma would go unseen.
    """
    from jaxrl_dist.envs import stock as stock_of  # here, since gymnax starts JAX before the command line sets it up

    is_stock = isinstance(env, stock_of.StockAugmented)
    require_environment(is_stock, env, "observations hold no stock", f"stock/{env.name} (envs/stock.py)")
    stock_of.check_params(env_params)
    of_stock = env_params.discount
    if isinstance(config.discount, jax.core.Tracer) or isinstance(of_stock, jax.core.Tracer):
        return jnp.where(config.discount == of_stock, config.discount, jnp.nan)
    require(
        bool(np.all(np.float32(config.discount) == np.float32(of_stock))),
        f"--discount is {config.discount}; it must be that of the stock, {of_stock} (--env-options discount=...)",
    )
    return config.discount


def make_agent(config: Config, env, env_params) -> Agent:
    """D-eta-N on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    from jaxrl_dist.envs import stock as stock_of  # here, as above

    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    stock_of.check_utility(config.utility)
    discount = checked_discount(config, env, env_params)
    network = Network(config.hidden, num_actions, config.num_quantiles, config.stock_scale)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the law of the successor's greedy action, both by the target network, moved by reward and discount.
        # Greedy is for the utility of c' + G, with the stock there; the target itself is of G alone.
        next_quantiles = network.apply(learner.target_network, batch.next_observation)
        next_stock = batch.next_observation[:, -1]
        next_action = stock_of.preferences(config.utility, next_stock, next_quantiles).argmax(-1)
        target = target_quantiles(batch, networks.at_action(next_quantiles, next_action))

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            quantiles = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(quantiles, target, config.kappa), quantiles

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
            "crossings": quantile.crossing_count(values).mean(),
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
            action = explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=discount
            )
            if config.hindsight:
                # Rows of a batch are independent draws, so the neighbour's stock is one that is not this row's.
                batch = with_stock(batch, jnp.roll(batch.observation[:, -1], 1))
            learner, metrics = update(state.learner, batch)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def preferences(state: State, observation: jax.Array) -> jax.Array:
        quantiles = network.apply(state.learner.network.parameters, observation)
        return stock_of.preferences(config.utility, observation[:, -1], quantiles)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return preferences(state, observation).argmax(-1).astype(jnp.int32)

    def explore(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        epsilon = policies.linear_schedule(
            config.epsilon_start, config.epsilon_end, config.exploration_steps, state.env_steps
        )
        return policies.epsilon_greedy(key, preferences(state, observation), epsilon)

    def target_policy(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(
            networks.at_action(network.apply(state.learner.network.parameters, observation), action)
        )

    def export(state: State) -> dict[str, jax.Array]:
        return portable.greedy_policy(
            state.learner.network.parameters["params"], num_actions,
            utility=np.array(config.utility), stock_scale=config.stock_scale,
        )  # fmt: skip

    claim = Claim(target_policy, predict, config.discount)
    return Agent(init, step, memoryless(act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
