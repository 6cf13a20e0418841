"""PPO: Proximal Policy Optimization, for a choice of actions and for continuous ones.

Paper: "Proximal Policy Optimization Algorithms", Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv 1707.06347;
advantages: "High-Dimensional Continuous Control Using Generalized Advantage Estimation", Schulman et al., arXiv
1506.02438.

The policy acts for a while, and what it did is used for several epochs of minibatches. A step that makes an action more
likely pays only until its probability has changed by the factor 1 + epsilon: there the objective is flat, so that
nothing is gained by leaving the policy whose actions are at hand.

    advantage     A_t = delta_t + gamma lambda A_{t+1} within an episode,
                  delta_t = r_t + gamma (1 - terminated) V(s_{t+1}) - V(s_t)
    ratio         rho = pi(a|s) / pi_old(a|s)
    policy        -mean of min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A), A normalised within the minibatch
    value         mean of 1/2 max((V - R)^2, (V_old + clip(V - V_old, -epsilon, epsilon) - R)^2),  R = A + V_old
    loss          policy + c_v value - c_e entropy of pi

s_{t+1} is the true successor: at a time limit the advantage takes its value, and nothing of the next episode. CleanRL's
and purejaxrl's codes take a time limit for an end.

Differences from the paper, all from its authors' code (openai/baselines) or CleanRL's: the value's loss is clipped
(`--clip-values`), advantages are normalised, gradients cut by their norm, step sizes fall in a line
(`--annealing-steps`), weights start orthogonal, observations and rewards may be normalised. Continuous actions are
Gaussian, with a deviation that does not depend on the state, and cut to [-1, 1] where the environment takes them.
Images pass MinAtar's convolution, whose weights start as PyTorch's, or are flattened (`--convolution False`).
Evaluation takes the mode. Statistics are those from before the rollout, so that the first minibatch has ratios of 1;
rewards are divided by one number per rollout.
With `--target-kl` a minibatch whose mean of rho - 1 - log rho is above it makes no update, nor do those after it in the
iteration (Stable-Baselines3's rule without its factor 1.5; CleanRL and Spinning Up look once an epoch).

Beyond the paper, a critic of laws (`--critic quantile`): N quantiles z_i of the return from s instead of its mean,

    law           instead of the value's loss, the mean over i and j of
                  |tau_i - 1{y_j < z_i}| huber_kappa(y_j - z_i) / kappa,  tau_i = (2i - 1) / 2N,
                  y_j: atoms of the law of the lambda-return, a mixture of n-step returns (`returns.lambda_law`)
    advantage     as above with V = mean of z_i; with `--risk` the mean over j of phi(y_j)

phi(y) is the influence function of the risk measure at the law Z(s): how fast the risk-adjusted value rises where mass
moves to y. For CVaR at level alpha it is min(y - q_alpha, 0) / alpha less its mean, the weight of a sample in Tamar et
al. (arXiv 1404.3862); for the mean it is y - V(s), which is the advantage above. The sum over a of grad pi(a|s) times
the mean of phi after a is the gradient of the risk of the return from s in the policy at s. The difference of risks
r + gamma risk(Z(s_{t+1})) - risk(Z(s_t)) is no such advantage: it averages over successors what chance should weigh.
Two caveats. Every state climbs the risk of the return from there on, as greedy risk-sensitive agents do, which need not
be best from the start. And CVaR is convex in mixtures: a policy that has settled on a risky action may find no way
back to a safe one.

Run:      python algorithms/policy_gradient/ppo.py --env-id CartPole-v1
Expected: CartPole-v1 above 400 of 500 within 100,000 steps, Pendulum-v1 above -220 within 300,000, with either critic.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import Count, NonNegative, configuration, require
from jaxrl_dist.distributional import quantile
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.risk import Risk
from jaxrl_dist.learning import clipped, interaction, normalization, returns, rollouts
from jaxrl_dist.learning.clipped import Batch, approximate_kl, normalized, policy_loss, value_loss
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(clipped.Settings):
    """Settings of PPO; the defaults are CleanRL's for classic control. Floats can be swept within one program."""

    normalize_advantages: bool = True
    """give the advantages of a minibatch mean 0 and deviation 1"""
    target_kl: NonNegative = 0.0
    """approximate divergence from the policy that acted, above which an iteration makes no more updates; 0: no bound"""
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""
    normalize_rewards: bool = False
    """divide rewards by the running standard deviation of their discounted sum"""
    critic: Literal["mean", "quantile"] = "mean"
    """what is predicted of returns: their mean, or quantiles of their law, which --clip-values does not hold"""
    num_quantiles: Count = 32
    """N, quantiles of a law"""
    kappa: NonNegative = 0.1
    """threshold of the Huber function in units of the return that is learned; far below returns, values jitter: see
    --normalize-rewards; 0 is plain quantile regression"""
    risk: str = "neutral"
    """what the policy climbs, with --critic quantile: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL, power:LEVEL,
    norm:NUMBER or mean-variance:WEIGHT"""


# MinAtar's games: purejaxrl's sizes. With the convolution an update takes six times as long; what it is worth at this
# step size was not measured. tanh saturates there: on Breakout 11 instead of 20 after 500,000 steps (3 seeds).
MINATAR = {
    "total_steps": 10_000_000, "num_envs": 64, "num_minibatches": 8, "learning_rate": 5e-3,
    "annealing_steps": 10_000_000, "activation": "relu", "convolution": False,
}  # fmt: skip
# Sizes for a GPU, published and not measured here: the hopper's are purejaxrl's, half cheetah's and ant's are brax's
# own, whose agent has squashed actions and more layers.
BRAX = {
    "total_steps": 50_000_000, "num_envs": 2048, "num_minibatches": 32, "hidden": (256, 256), "learning_rate": 3e-4,
    "normalize_observations": True, "normalize_rewards": True,
}  # fmt: skip
# Gymnasium's MuJoCo tasks: CleanRL's settings, its 2,048 steps of one environment as 128 steps of 16.
MUJOCO = {
    "total_steps": 1_000_000, "num_envs": 16, "num_epochs": 10, "num_minibatches": 32, "learning_rate": 3e-4,
    "annealing_steps": 1_000_000, "entropy_weight": 0.0, "normalize_observations": True, "normalize_rewards": True,
}  # fmt: skip
# Classic control: sizes for a CPU.
PRESETS = {
    "CartPole-v1": {"total_steps": 100_000, "num_envs": 8, "learning_rate": 1e-3},
    "Acrobot-v1": {"total_steps": 200_000, "num_envs": 8, "learning_rate": 1e-3},
    "Catch-bsuite": {"total_steps": 50_000, "num_envs": 8, "learning_rate": 1e-3},
    "Pendulum-v1": {
        "total_steps": 300_000, "num_envs": 16, "num_epochs": 10, "num_minibatches": 8, "discount": 0.9,
        "entropy_weight": 0.0, "learning_rate": 1e-3, "annealing_steps": 300_000, "clip_values": False,
        "normalize_rewards": True,
    },
    "Breakout-MinAtar": MINATAR,
    "Asterix-MinAtar": MINATAR,
    "SpaceInvaders-MinAtar": MINATAR,
    "Freeway-MinAtar": MINATAR,
    "mujoco/Hopper-v5": MUJOCO,
    "mujoco/Walker2d-v5": MUJOCO,
    "mujoco/HalfCheetah-v5": MUJOCO,
    "mujoco/InvertedPendulum-v5": MUJOCO | {"total_steps": 200_000, "annealing_steps": 200_000},
    "brax/hopper": BRAX | {"num_steps": 10, "entropy_weight": 0.0},
    "brax/halfcheetah": BRAX | {
        "num_steps": 160, "num_epochs": 8, "discount": 0.95, "entropy_weight": 1e-3, "clip_range": 0.3,
        "clip_values": False,
    },
    "brax/ant": BRAX | {
        "num_steps": 80, "discount": 0.97, "entropy_weight": 0.01, "clip_range": 0.3, "clip_values": False,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    interaction: Interaction
    normalizer: RunningStatistics | None
    scale: RewardScale | None
    key: jax.Array


# -- Losses -----------------------------------------------------------------------------------------------------------


def law_loss(quantiles: jax.Array, target: jax.Array, kappa: float | jax.Array) -> jax.Array:
    """Mean quantile Huber loss of `[batch, quantiles]` on `[batch, atoms]`, mean over every axis."""
    chex.assert_rank([quantiles, target], 2)
    chex.assert_equal_shape_prefix([quantiles, target], 1)
    fractions = quantile.midpoints(quantiles.shape[-1])
    return quantile.quantile_huber_loss(quantiles, target, fractions, kappa=kappa, over_predicted="mean").mean()


def influence(risk: Risk, quantiles: jax.Array, returns: jax.Array) -> jax.Array:
    """phi, how fast a law's risk-adjusted value rises where its mass moves to `returns`: `[batch, quantiles]`,
    `[batch, n]` -> `[batch, n]`, of mean 0 over the law itself.

    The value is the integral of F^-1(p) dC(p), with C(p) the measure's weight on fractions up to p (`risk.cumulative`),
    and so phi' = C'(F). Between two quantiles C' is its mean over the fractions between theirs.
    """
    chex.assert_rank([quantiles, returns], 2)
    if risk.name in ("neutral", "mean-variance"):
        centred, spread = returns - quantiles.mean(-1, keepdims=True), quantiles.var(-1, keepdims=True)
        return centred - risks.variance_penalty(risk) * (centred**2 - spread)
    ascending = quantile.sort_atoms(quantiles)
    edges = jnp.concatenate([jnp.zeros(1), quantile.midpoints(quantiles.shape[-1]), jnp.ones(1)])
    slope = jnp.diff(risks.cumulative(risk, edges)) / jnp.diff(edges)
    low, high = ascending[:, None, :-1], ascending[:, None, 1:]

    def climbed(x: jax.Array) -> jax.Array:
        """The integral of phi' from the lowest quantile to `[batch, n]`."""
        outside = slope[0] * jnp.minimum(x - ascending[:, :1], 0) + slope[-1] * jnp.maximum(x - ascending[:, -1:], 0)
        return outside + ((jnp.clip(x[..., None], low, high) - low) * slope[1:-1]).sum(-1)

    return climbed(returns) - climbed(ascending).mean(-1, keepdims=True)


def unless(stopped: jax.Array, learner: Trained, stepped: Trained) -> Trained:
    """`learner` where `stopped` `[]`, else `stepped`; the count by which step sizes fall goes on, as env steps do."""

    def of_rate(path, _) -> bool:
        return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"

    kept = optax.tree.where(stopped, learner, stepped)
    count = optax.tree.get(stepped.optimizer, "count", filtering=of_rate)
    return kept._replace(optimizer=optax.tree.set(kept.optimizer, of_rate, count=count))


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PPO on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    clock, laws = clipped.clock_of(config), config.critic == "quantile"
    risk = risks.parse(config.risk)
    require(
        laws or risk == risks.NEUTRAL,
        f"--risk is {config.risk!r}; without --critic quantile it must be 'neutral', since a mean tells no other",
    )
    network = clipped.network_of(config, env, env_params, config.num_quantiles if laws else 0)
    optimizer = clipped.optimizer_of(config)
    policy = clipped.policy_of(
        network, config.discount, lambda state: state.normalizer, lambda state: normalization.unit(state.scale)
    )

    def update(progress: tuple[Trained, jax.Array], batch: Batch) -> tuple[tuple[Trained, jax.Array], dict]:
        """One gradient step on a minibatch, unless this one or one before it has `stopped` the iteration's."""
        learner, stopped = progress
        advantage = normalized(batch.advantage) if config.normalize_advantages else batch.advantage

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            of_policy = policy_loss(ratio, advantage, config.clip_range)
            if laws:
                of_value = law_loss(value, batch.target, config.kappa)
            else:
                clip_range = config.clip_range if config.clip_values else None
                of_value = value_loss(value, batch.value, batch.target, clip_range)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy  # eq. 9
            return loss, {
                "policy_loss": of_policy, "value_loss": of_value, "entropy": entropy,
                "approximate_kl": approximate_kl(log_ratio),
                "clipped_ratios": (jnp.abs(ratio - 1) > config.clip_range).mean(),
            }  # fmt: skip

        stepped, (loss, metrics, norm) = descend(optimizer, learner, objective)
        stopped |= (config.target_kl > 0) & (metrics["approximate_kl"] > config.target_kl)
        metrics |= {"loss": loss, "gradient_norm": norm, "updates_made": ~stopped}
        return (unless(stopped, learner, stepped), stopped), metrics

    def init(key: jax.Array) -> State:
        key, network_key, start_key = jax.random.split(key, 3)
        shape = env.observation_space(env_params).shape
        learner = begin(optimizer, network.init(network_key, jnp.zeros((1, *shape))))
        now = interaction.start(env, env_params, start_key, config.num_envs)
        normalizer = normalization.create(shape) if config.normalize_observations else None
        scale = normalization.create_scale(config.num_envs) if config.normalize_rewards else None
        return State(learner, now, normalizer, scale, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key, law_key = jax.random.split(state.key, 4)
        parameters = state.learner.parameters

        # Rollout: actions of the present policy, with how likely they were.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, drawn = policy.explore(state, observation, key)
            return action, memory, drawn

        now, (lived, (action, log_density)), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow
        )

        # Advantages: with the value of the true successor, also at a time limit.
        done = lived.terminated | lived.truncated
        scale, reward = normalization.scale_rewards(state.scale, lived.reward, done, config.discount)
        observation, next_observation = (
            normalize(state.normalizer, x) for x in (lived.observation, lived.next_observation)
        )
        claimed, following = (
            jax.vmap(lambda x: network.apply(parameters, x)[1])(x) for x in (observation, next_observation)
        )
        value, next_value = (x.mean(-1) if laws else x for x in (claimed, following))
        ended = lived.terminated, lived.truncated
        advantage = returns.gae(reward, value, next_value, *ended, config.discount, config.gae_decay)
        target = advantage + value
        if laws:
            target = returns.lambda_law(reward, following, *ended, config.discount, config.gae_decay, law_key)
        if risk != risks.NEUTRAL:  # in the environment's rewards, since not every measure scales with them
            unit = normalization.unit(scale)
            advantage = jax.vmap(lambda *x: influence(risk, *x))(unit * claimed, unit * target).mean(-1) / unit
        batch = Batch(observation, action, log_density, value, advantage, target)
        batch = jax.tree.map(lambda x: x.reshape(clock.env_steps, *x.shape[2:]), batch)

        # Epochs of minibatches.
        (learner, _), losses = rollouts.epochs(
            update, (state.learner, jnp.zeros((), bool)), batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip

        normalizer = state.normalizer
        if normalizer is not None:
            seen = lived.observation.reshape(clock.env_steps, *lived.observation.shape[2:])
            normalizer = normalization.update(normalizer, seen)
        unit = normalization.unit(scale)
        metrics = losses | {"value": value * unit, "target": batch.target * unit}
        return State(learner, now, normalizer, scale, key), episodes | jax.tree.map(average, metrics)

    return Agent(init, step, memoryless(policy.act), clock, policy.claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
