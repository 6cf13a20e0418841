"""PROPS: Proximal Robust On-Policy Sampling, PPO on data that are on-policy although nobody sampled them so; and ROS.

Paper: "On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling", Corrado, Hanna, arXiv 2311.08290.
ROS: "Robust On-Policy Sampling for Data-Efficient Policy Evaluation in Reinforcement Learning", Zhong, Zhang,
Schäfer, Albrecht, Hanna, arXiv 2111.14552. PPO: arXiv 1707.06347, `policy_gradient/ppo.py`.

A gradient wants each action as often as the policy theta takes it, and independent draws miss that by chance. So
another policy, phi, acts: one that takes more often what was taken too rarely in the data collected so far, and is made
anew from theta after every few steps. The data of the last b rollouts are kept, and count as theta's: what old policies
did too often the next rollout does less often.

    D             the last b - 1 rollouts, and the steps of this one so far
    ratio         rho = phi(a|s) / theta(a|s), of the actions in D
    PROPS         phi <- theta, then minibatches down the mean of max(rho, clip(rho, 1 - epsilon, 1 + epsilon))
                  + lambda KL(theta(.|s) || phi(.|s)), until the mean of (rho - 1) - log rho is above delta
    ROS           phi <- theta - alpha gradient of the mean of rho
    theta         PPO on all of D, without importance weights: log densities, values and advantages are theta's of now

The objective is PPO's with an advantage of -1 everywhere: it is flat where an action has become rare enough. Where
frequencies are theta's its slope is 0, since the mean of grad log theta(a|s) over theta's own actions is 0.
`--behaviour on_policy` lets theta act, which with `--num-batches 1` is PPO, number for number, and with more of them
the paper's PPO with a buffer.

Differences from the paper and its authors' code (NicholasCorrado/PROPS): phi is made before its steps, from the theta
of now; there after them, so that the first steps of a rollout follow a phi made for the theta before. Minibatches part
D evenly; in the present code each of them is all of D. The penalty has its closed form for both kinds of actions; the
code has it commented out. ROS's step is one of plain descent, Adam's there, and its period is the one that is set (its
own is 1). A time limit bootstraps; there it is an end. PPO has no bound on its KL. Nothing is learned before b - 1
rollouts of the first policy fill the buffer, so that its size never changes.

Run:      python algorithms/policy_gradient/props.py --env-id CartPole-v1
Expected: CartPole-v1 above 400 of 500 within 100,000 steps; experiments/sampling_error has sampling errors.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import Count, NonNegative, Positive, configuration, require
from jaxrl_dist.learning import clipped, interaction, normalization, returns, rollouts
from jaxrl_dist.learning.clipped import Batch, approximate_kl, mean_of, normalized, policy_loss, value_loss
from jaxrl_dist.learning.interaction import Average, Interaction, Transition, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.policies import Choice, Gaussian

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(clipped.Settings):
    """Settings of PROPS; the defaults are CleanRL's for PPO and the authors' for the behaviour policy. Floats can be
    swept within one program."""

    behaviour: Literal["props", "ros", "on_policy"] = "props"
    """who acts: a policy made by PROPS or by ROS, or the one that is learned"""
    num_batches: Count = 2
    """b, rollouts that are kept"""
    behaviour_period: Count = 16
    """steps of each environment between updates of the behaviour policy"""
    behaviour_epochs: Count = 4
    """times that an update of the behaviour policy goes through the data; of PROPS, as the next five"""
    behaviour_minibatches: Count = 4
    """gradient steps in each"""

    behaviour_learning_rate: NonNegative = 1e-3
    """step size of the behaviour policy's Adam"""
    behaviour_clip_range: Positive = 0.3
    """epsilon of the behaviour policy"""
    behaviour_kl_bound: NonNegative = 0.03
    """delta, estimated divergence above which an update of the behaviour policy ends"""
    kl_weight: NonNegative = 0.1
    """lambda, weight of the divergence from the policy in the behaviour policy's objective"""
    ros_learning_rate: NonNegative = 1.0
    """alpha, step size of ROS"""
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""
    normalize_rewards: bool = False
    """divide rewards by the running standard deviation of their discounted sum"""


# Sizes for a CPU: PPO's.
PRESETS = {
    "CartPole-v1": {"total_steps": 100_000, "num_envs": 8, "behaviour_period": 8, "learning_rate": 1e-3},
    "Acrobot-v1": {"total_steps": 200_000, "num_envs": 8, "behaviour_period": 8, "learning_rate": 1e-3},
    "Pendulum-v1": {
        "total_steps": 300_000, "num_envs": 16, "num_epochs": 10, "num_minibatches": 8, "discount": 0.9,
        "entropy_weight": 0.0, "learning_rate": 1e-3, "annealing_steps": 300_000, "clip_values": False,
        "normalize_rewards": True,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    behaviour: optax.OptState
    """of the behaviour policy's optimiser; its parameters begin at the learner's every time"""
    interaction: Interaction
    buffer: Transition
    """`[num_batches * num_steps, num_envs, ...]`, the newest last, with actions as they were drawn"""
    normalizer: RunningStatistics | None
    scale: RewardScale | None
    key: jax.Array


# -- Losses of the behaviour policy -----------------------------------------------------------------------------------


def behaviour_loss(ratio: jax.Array, clip_range: float | jax.Array, known: jax.Array) -> jax.Array:
    """`policy_loss` of known rows `[rows]` whose advantages are all -1 (PROPS, eq. 5)."""
    return mean_of(jnp.maximum(ratio, jnp.clip(ratio, 1 - clip_range, 1 + clip_range)), known)


def divergence(one: Choice | Gaussian, other: Choice | Gaussian) -> jax.Array:
    """KL(one || other) of laws of actions, in closed form: `[...]`."""
    if isinstance(one, Choice):
        log_one, log_other = jax.nn.log_softmax(one.logits), jax.nn.log_softmax(other.logits)
        return (jnp.exp(log_one) * (log_one - log_other)).sum(-1)
    squares = jnp.exp(2 * (one.log_std - other.log_std)) + ((one.mean - other.mean) * jnp.exp(-other.log_std)) ** 2
    return (other.log_std - one.log_std + (squares - 1) / 2).sum(-1)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PROPS on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    clock = clipped.clock_of(config)
    clock = clock._replace(warmup_steps=(config.num_batches - 1) * clock.env_steps)
    on_policy, ros = config.behaviour == "on_policy", config.behaviour == "ros"
    steps = config.num_batches * config.num_steps
    rows = steps * config.num_envs
    period = config.num_steps if on_policy else config.behaviour_period
    behaviour_epochs, behaviour_minibatches = (1, 1) if ros else (config.behaviour_epochs, config.behaviour_minibatches)
    require(
        config.num_steps % period == 0,
        f"--behaviour-period is {period}; it must divide --num-steps = {config.num_steps}",
    )
    require(
        on_policy or rows % behaviour_minibatches == 0,
        f"--behaviour-minibatches is {behaviour_minibatches}; it must divide "
        f"--num-batches x --num-envs x --num-steps = {rows}",
    )
    network = clipped.network_of(config, env, env_params)
    optimizer = clipped.optimizer_of(config)
    behaviour_optimizer = optax.chain(
        optax.clip_by_global_norm(config.gradient_bound),
        optax.adam(config.behaviour_learning_rate, eps=config.adam_epsilon),
    )
    if ros:
        behaviour_optimizer = optax.sgd(config.ros_learning_rate)
    policy = clipped.policy_of(
        network, config.discount, lambda state: state.normalizer, lambda state: normalization.unit(state.scale)
    )

    def behave(state: State, behaviour: optax.OptState, buffer: Transition, count: jax.Array, key: jax.Array):
        """The behaviour policy for the first `count` rows of the buffer: its parameters, its optimiser's state, and
        which of its steps were taken."""
        observation, action = (
            x.reshape(rows, *x.shape[2:]) for x in (normalize(state.normalizer, buffer.observation), buffer.action)
        )
        target = network.apply(state.learner.parameters, observation)[0]
        log_density = target.log_density(action)

        def one(carry: tuple[Trained, jax.Array], numbers: jax.Array):
            known = numbers < count

            def objective(parameters):
                law = network.apply(parameters, observation[numbers])[0]
                # What is not known must have finite slopes too.
                log_ratio = jnp.where(known, law.log_density(action[numbers]) - log_density[numbers], 0)
                ratio = jnp.exp(log_ratio)
                if ros:
                    return mean_of(ratio, known), jnp.float32(0)
                apart = divergence(jax.tree.map(lambda x: x[numbers], target), law)
                loss = behaviour_loss(ratio, config.behaviour_clip_range, known)
                return loss + config.kl_weight * mean_of(apart, known), mean_of(ratio - 1 - log_ratio, known)

            acting, ended = carry
            moved, seen = descend(behaviour_optimizer, acting, objective)
            ended = ended | (False if ros else seen.aux > config.behaviour_kl_bound)
            taken = ~ended & known.any()
            return (jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, acting), ended), taken

        # Known rows come first in an order of their own, and are dealt out to the minibatches like cards.
        drawn = jax.random.uniform(key, (behaviour_epochs, rows))
        order = jnp.argsort(jnp.where(jnp.arange(rows) < count, drawn, 2), axis=1)
        minibatches = order.reshape(behaviour_epochs, -1, behaviour_minibatches).swapaxes(1, 2)
        start = Trained(state.learner.parameters, behaviour), jnp.zeros((), bool)
        (acting, _), taken = jax.lax.scan(one, start, minibatches.reshape(-1, rows // behaviour_minibatches))
        return acting.parameters, acting.optimizer, taken

    def collect(state: State, now: Interaction, key: jax.Array, steps: int, parameters: Any):
        """Let a policy act: what happened with actions as they were drawn, leaves `[steps, num_envs, ...]`."""
        acting = state._replace(learner=state.learner._replace(parameters=parameters))

        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, (drawn, _) = policy.explore(acting, observation, key)
            return action, memory, drawn

        now, (lived, drawn), episodes = rollouts.collect(env, env_params, now, key, steps, follow)
        return now, lived._replace(action=drawn, extras=()), episodes

    def update(learner: Trained, batch: Batch) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step of PPO on a minibatch."""

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            of_policy = policy_loss(ratio, normalized(batch.advantage), config.clip_range)
            of_value = value_loss(value, batch.value, batch.target, config.clip_range if config.clip_values else None)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy
            return loss, {
                "policy_loss": of_policy, "value_loss": of_value, "entropy": entropy,
                "approximate_kl": approximate_kl(log_ratio),
                "clipped_ratios": (jnp.abs(ratio - 1) > config.clip_range).mean(),
            }  # fmt: skip

        learner, (loss, metrics, norm) = descend(optimizer, learner, objective)
        return learner, metrics | {"loss": loss, "gradient_norm": norm}

    def seen(normalizer: RunningStatistics | None, lived: Transition) -> RunningStatistics | None:
        """Statistics with the observations of a rollout."""
        if normalizer is None:
            return None
        return normalization.update(normalizer, lived.observation.reshape(-1, *lived.observation.shape[2:]))

    def init(key: jax.Array) -> State:
        key, network_key, start_key = jax.random.split(key, 3)
        shape = env.observation_space(env_params).shape
        parameters = network.init(network_key, jnp.zeros((1, *shape)))
        now = interaction.start(env, env_params, start_key, config.num_envs)
        normalizer = normalization.create(shape) if config.normalize_observations else None
        scale = normalization.create_scale(config.num_envs) if config.normalize_rewards else None
        behaviour = behaviour_optimizer.init(parameters)
        state = State(begin(optimizer, parameters), behaviour, now, None, normalizer, scale, key)

        # The oldest part of the buffer is nothing, and the next to be replaced; the others are the first policy's.
        like = jax.eval_shape(lambda: collect(state, now, start_key, config.num_steps, parameters)[1])
        buffer = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        if config.num_batches > 1:
            key, collect_key = jax.random.split(key)
            now, lived, _ = collect(state, now, collect_key, steps - config.num_steps, parameters)
            buffer = jax.tree.map(lambda *x: jnp.concatenate(x), buffer, lived)
            done = lived.terminated | lived.truncated
            scale, _ = normalization.scale_rewards(scale, lived.reward, done, config.discount)
            normalizer = seen(normalizer, lived)
        return State(state.learner, behaviour, now, buffer, normalizer, scale, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key = jax.random.split(state.key, 3)
        parameters, old = state.learner.parameters, steps - config.num_steps

        # Rollout: as the behaviour policy acts, in place of the oldest one.
        def a_while(carry: tuple[Interaction, Transition, optax.OptState], index: jax.Array):
            now, buffer, behaviour = carry
            acting, act_key, metrics = parameters, collect_key, {}
            if not on_policy:
                behave_key, act_key = jax.random.split(jax.random.fold_in(collect_key, index))
                count = (old + index * period) * config.num_envs
                acting, behaviour, taken = behave(state, behaviour, buffer, count, behave_key)
                metrics = {"behaviour_updates": taken}
            now, lived, episodes = collect(state, now, act_key, period, acting)
            if not on_policy:
                met = normalize(state.normalizer, lived.observation.reshape(-1, *lived.observation.shape[2:]))
                metrics |= {"behaviour_kl": divergence(*(network.apply(x, met)[0] for x in (parameters, acting)))}
            buffer = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, old + index * period, axis=0), buffer, lived
            )
            return (now, buffer, behaviour), (episodes, metrics)

        buffer = jax.tree.map(lambda x: jnp.roll(x, -config.num_steps, axis=0), state.buffer)
        (now, buffer, behaviour), (episodes, of_behaviour) = jax.lax.scan(
            a_while, (state.interaction, buffer, state.behaviour), jnp.arange(config.num_steps // period)
        )
        episodes = jax.tree.map(lambda x: x.sum(0), episodes)

        # Advantages of each rollout apart: with the value of the true successor, also at a time limit.
        lived, done = jax.tree.map(lambda x: x[old:], buffer), (buffer.terminated | buffer.truncated)[old:]
        scale, _ = normalization.scale_rewards(state.scale, lived.reward, done, config.discount)
        reward = normalization.scaled(scale, buffer.reward)
        observation, next_observation = (
            normalize(state.normalizer, x) for x in (buffer.observation, buffer.next_observation)
        )
        laws, value = jax.vmap(lambda x: network.apply(parameters, x))(observation)
        next_value = jax.vmap(lambda x: network.apply(parameters, x)[1])(next_observation)
        by_rollout = (
            x.reshape(config.num_batches, config.num_steps, config.num_envs)
            for x in (reward, value, next_value, buffer.terminated, buffer.truncated)
        )
        advantage = jax.vmap(lambda *x: returns.gae(*x, config.discount, config.gae_decay))(*by_rollout)
        advantage = advantage.reshape(steps, config.num_envs)
        log_density = laws.log_density(buffer.action)  # the policy's of now, whoever acted
        batch = Batch(observation, buffer.action, log_density, value, advantage, advantage + value)
        batch = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), batch)

        # Epochs of minibatches.
        learner, losses = rollouts.epochs(
            update, state.learner, batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip

        unit = normalization.unit(scale)
        metrics = losses | of_behaviour | {"value": value * unit, "target": batch.target * unit}
        state = State(learner, behaviour, now, buffer, seen(state.normalizer, lived), scale, key)
        return state, episodes | jax.tree.map(average, metrics)

    return Agent(init, step, memoryless(policy.act), clock, policy.claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
