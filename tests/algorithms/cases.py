"""One row per algorithm: all that the tests of every agent (`test_every_agent.py`) must know of one.

An algorithm without a row fails them. A row names what keeps the agent small, what of it must be quiet for its values
to be those of the probes, and which parts of its state each of its floats must, and must not, change.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import by_hand
import jax
import jax.numpy as jnp
from gymnax.environments import spaces

from jaxrl_dist.envs import stock
from jaxrl_dist.envs.factored import MultiDiscrete
from jaxrl_dist.envs.probe import Probe, ProbeParams
from jaxrl_dist.envs.tokens import Tokens
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.interaction import Transition
from jaxrl_dist.running.catalog import find_algorithm

DISCOUNT = 0.7
# Episodes of the probes last three steps, where nothing else ends them: time limits are frequent.
LIMIT = 3


class World(NamedTuple):
    """An environment with the cases of the probes, and the observations at which agents are looked at."""

    env: Any
    params: Callable[[Any, Any], Any]
    """of a configuration and a case"""
    observation: jax.Array
    """`[looks, size]`; the first component is the probe's"""
    num_actions: int = 0
    """0: continuous"""


def bare(config: Any, case: Any) -> ProbeParams:
    return ProbeParams(max_steps_in_episode=LIMIT, case=case)


LOOKS = jnp.array([[-1.0], [0.0], [1.0]])
CONTINUOUS = World(Probe(), bare, LOOKS)
DISCRETE = World(Probe(discrete_actions=2), bare, LOOKS, 2)


class WithLevels(Probe):
    """The probe with sixteen levels, which differ in their time limit and so not in values."""

    def sample_level(self, key, params):
        return params.replace(max_steps_in_episode=jax.random.randint(key, (), 2, 18))


class WithFactors(Probe):
    """The probe with a choice of two and one of three at once, each of which earns half of what the choice alone does;
    the third is as wrong as can be."""

    def action_space(self, params=None):
        return MultiDiscrete((2, 3))

    def _reward(self, params, observation, action):
        return (super()._reward(params, observation, action[0]) + super()._reward(params, observation, action[1])) / 2


FACTORED = World(WithFactors(discrete_actions=2), bare, LOOKS, 2)
LEVELS = World(WithLevels(discrete_actions=2), bare, LOOKS, 2)


class WithRewards(Probe):
    """The probe with its reward in two parts, of which neither says what is best."""

    def step_env(self, key, state, action, params):
        *rest, reward, terminated, info = super().step_env(key, state, action, params)
        return *rest, reward, terminated, info | {"rewards": jnp.stack([0.5 - reward, 2 * reward - 0.5])}


REWARDS = World(WithRewards(discrete_actions=2), bare, LOOKS, 2)


class WithTokens(Tokens):
    """The discrete probe in two tokens behind a prompt of one, which is its observation: the second is its action, and
    earns the values of the probe, with their discount, at once. Tokens beyond the probe's actions are wrong ones."""

    names, prompt_length, completion_length, name = ("0", "1", "2"), 1, 2, "tokens"

    def draw(self, key):
        return jax.random.randint(key, (1,), 0, 3), jnp.ones(2, jnp.int32)

    def attempt(self, key, prompt):
        return jax.random.randint(key, (2,), 0, 3)

    def verify(self, prompt, completion):
        return jnp.float32(0), jnp.array(True)

    def step_env(self, key, state, action, params):
        _, state, _, ended, info = super().step_env(key, state, action, params)
        seen = self.observe(state)
        earned = Probe(2).action_value(params, seen[:1], action, DISCOUNT)
        return seen, state, jnp.where(ended, earned, 0.0).astype(jnp.float32), ended, info

    def observe(self, state):
        seen = super().observe(state)
        return jnp.append(jnp.array([0, 1, -1])[seen[0]], seen).astype(jnp.float32)

    def split(self, observation):
        return super().split(observation[..., 1:])

    def observation_space(self, params=None):
        return spaces.Box(-1.0, 3.0, (5,))


# The prompt's token, a first one, room for a second, and that two are written.
TOKENS = World(WithTokens(), bare, jnp.array([[-1.0, 2, 0, 0, 2], [0, 0, 0, 0, 2], [1, 1, 0, 0, 2]]), 2)


def with_stock() -> World:
    """The discrete probe with a stock beside its observation."""
    env = stock.StockAugmented(DISCRETE.env, ProbeParams(max_steps_in_episode=LIMIT), DISCOUNT, -1.0, 1.0)

    def params(config, case):  # the stock's gamma is the agent's
        return env.default_params.replace(inner=bare(config, case), discount=config.discount)

    looks = jnp.concatenate([jnp.tile(LOOKS, (2, 1)), jnp.repeat(jnp.array([[-1.0], [1.0]]), 3, axis=0)], axis=1)
    return World(env, params, looks, 2)


class Feels(NamedTuple):
    """Parts of the state that must differ after one iteration where a float is another, and parts that must not."""

    must: frozenset[str]
    never: frozenset[str] = frozenset()
    """"others" stands for all that `must` does not name"""


def feels(must: str, never: str = "") -> Feels:
    return Feels(frozenset(must.split()), frozenset(never.split()))


def only(must: str) -> Feels:
    return feels(must, "others")


LATER = feels("")
"""Nothing is known of the first iteration; after some more of them something differs."""


class Learning(NamedTuple):
    """What the agent must reach with its preset: the mean return at the last three of ten evaluations in so many steps,
    as the median of three seeds."""

    env_id: str
    steps: int
    at_least: float


class Case(NamedTuple):
    """What the shared tests know of one agent."""

    small: dict
    """settings that differ from the defaults, in all lanes"""
    quiet: dict
    """floats of the lanes that are held against the probes' values"""
    feels: dict[str, Feels]
    """of every float"""
    metrics: str
    """all that it reports"""
    world: World
    learns: Learning | None
    """None: it has a check of its own"""
    iterations: int = 700
    """for the probes"""
    dead: tuple[str, ...] = ()
    """settings that belong to a switch that is off"""
    more_parts: Callable[[Any, dict], dict] = lambda state, parts: parts
    """what else of a state is looked at by name"""
    draws: bool = False
    """whether its targets are drawn: actions, noise, fractions"""
    replay: bool = True
    """whether it has one, and the `Settings` that go with it"""
    data: Callable[[World, Any], Transition] | None = None
    """what it learns from in a case of the probes, if it meets no environment"""
    both: bool = False
    """whether it takes continuous actions as well as a choice of them"""
    old_rows: Callable[[Any], Any] = lambda state: state
    """a state whose next batch is of what was stored before"""


# -- families ---------------------------------------------------------------------------------------------------------

EPISODES = "episode_return episode_length "
# Sizes that tell the counts apart: 3 steps of 2 environments per iteration; a warm-up that is no multiple of 2.
SIZES = {
    "num_envs": 2, "steps_per_iteration": 3, "updates_per_iteration": 1, "warmup_steps": 383, "replay_capacity": 6000,
    "batch_size": 32, "discount": DISCOUNT,
}  # fmt: skip

ACTOR_CRITIC = {
    **SIZES, "actor_hidden": (16, 16), "critic_hidden": (16, 16), "actor_learning_rate": 3e-3,
    "critic_learning_rate": 1e-2, "normalize_observations": True,
}  # fmt: skip
ACTOR_CRITIC_FEELS = {
    "discount": feels("critic_optimizer", "replay log_temperature temperature_optimizer"),
    "actor_learning_rate": only("actor"),
    # The actor climbs the critics as they are after their update.
    "critic_learning_rate": feels(
        "critic target_critic actor_optimizer", "replay log_temperature temperature_optimizer"
    ),
}  # fmt: skip
TARGET_ACTOR_FEELS = {"polyak": only("target_critic target_actor"), "actor_learning_rate": only("actor target_actor")}
EXPLORES_BY_NOISE = {"exploration_noise": feels("replay")}
ACTOR_CRITIC_METRICS = EPISODES + "critic_loss actor_loss value target critic_gradient_norm "

SOFT = {"initial_temperature": 0.2, "temperature_learning_rate": 1e-3}
# A temperature so small that entropy is worth nothing.
SOFT_QUIET = {"initial_temperature": 1e-6, "temperature_learning_rate": 0.0}
SOFT_FEELS = {
    "temperature_learning_rate": only("log_temperature"),
    "target_entropy_per_action": feels("temperature_optimizer", "actor critic actor_optimizer critic_optimizer replay"),
    "initial_temperature": feels("critic_optimizer actor_optimizer log_temperature"),
}

VALUE = {
    **SIZES, "num_steps": 1, "target_period": 20, "learning_rate": 1e-2, "adam_epsilon": 1e-6, "epsilon_start": 1.0,
    "epsilon_end": 0.5, "exploration_steps": 1000, "hidden": (16, 16),
}  # fmt: skip
OF_THE_LOSS = only("network optimizer")
VALUE_FEELS = {
    "discount": OF_THE_LOSS, "reward_clip": OF_THE_LOSS, "learning_rate": only("network"),
    "adam_epsilon": only("network"), "epsilon_start": LATER, "epsilon_end": LATER,
}  # fmt: skip
VALUE_METRICS = EPISODES + "loss value target gradient_norm "
# A gradient so short that it is cut in every lane.
FACTORED_SMALL = {"gradient_bound": 0.05, "polyak": 1.0}
FACTORED_QUIET = {"gradient_bound": 40.0}
FACTORED_FEELS = {"gradient_bound": OF_THE_LOSS, "huber_threshold": OF_THE_LOSS, "polyak": LATER}
# Targets stay inside the support, where the projection keeps the mean.
SUPPORT = {"v_min": -4.0, "v_max": 4.0, "num_atoms": 17}
SUPPORT_FEELS = {"v_min": OF_THE_LOSS, "v_max": OF_THE_LOSS}


def logged(world: World, case: Any, noise: float | None) -> Transition:
    """Episodes of a case of the probes with any actions, or with the best one and so much noise: 512 rows."""
    params, key = bare(None, case), jax.random.key(5)
    now = interaction.start(world.env, params, jax.random.fold_in(key, 99), 16)

    def one(now, index):
        act_key, step_key = jax.random.split(jax.random.fold_in(key, index))
        action = interaction.random_action(world.env, params, act_key, 16)
        if noise is not None:
            action = world.env.optimal_action(params, now.observation) + noise * action
        now, lived, _ = interaction.step(world.env, params, now, action, step_key)
        return now, lived

    lived = jax.lax.scan(one, now, jnp.arange(32))[1]
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(512, *x.shape[2:]), lived)


def any_action(world: World, case: Any) -> Transition:
    return logged(world, case, None)


def best_and_noise(world: World, case: Any) -> Transition:
    return logged(world, case, 0.3)


ON_POLICY = {
    "num_envs": 4, "num_steps": 16, "num_epochs": 2, "num_minibatches": 4, "hidden": (16, 16), "discount": DISCOUNT,
    "gae_decay": 0.95, "entropy_weight": 0.01, "learning_rate": 1e-2,
}  # fmt: skip
ON_POLICY_QUIET = {"entropy_weight": 0.0, "learning_rate": 3e-3}
ON_POLICY_FEELS = dict.fromkeys(
    ("discount", "gae_decay", "clip_range", "value_weight", "entropy_weight", "learning_rate", "adam_epsilon",
     "gradient_bound"), feels("parameters", "interaction"),
)  # fmt: skip
ON_POLICY_METRICS = "loss policy_loss value_loss entropy value target gradient_norm "

DISTILLED = {
    "warmup_steps": 30, "predictor_hidden": (8,), "target_hidden": (8,), "num_features": 4, "predictor_share": 0.6,
}  # fmt: skip
DISTILLED_FEELS = dict.fromkeys(
    ("intrinsic_discount", "extrinsic_weight", "intrinsic_weight", "predictor_share"),
    feels("parameters", "interaction"),
)
DISTILLED_METRICS = (
    "approximate_kl clipped_ratios predictor_loss bonus intrinsic_reward intrinsic_value intrinsic_value_loss"
)

OFFLINE = {"batch_size": 32}

# The optimum is about -130. Younger policies still fall back now and then, all soft ones about step 6,000.
PENDULUM = Learning("Pendulum-v1", 15_000, -200)
# The best return is 1: every ball caught.
CATCH = Learning("Catch-bsuite", 20_000, 0.9)


def actor_critic(small=(), quiet=(), feels=(), metrics="", soft=False, polyak=True, **more) -> Case:
    """`polyak`: its targets follow at every update; else they are copied now and then."""
    follows = {"polyak": only("target_critic")} if polyak else {}
    return Case(
        ACTOR_CRITIC | ({"polyak": 0.05} if polyak else {}) | (SOFT if soft else {}) | dict(small),
        (SOFT_QUIET if soft else {}) | dict(quiet),
        ACTOR_CRITIC_FEELS | follows | (SOFT_FEELS if soft else EXPLORES_BY_NOISE) | dict(feels),
        ACTOR_CRITIC_METRICS + ("temperature largest_bonus entropy " if soft else "saturation ") + metrics,
        CONTINUOUS,
        **({"learns": PENDULUM, "iterations": 900, "draws": soft} | more),
    )


def value_based(small=(), quiet=(), feels=(), metrics="", world=DISCRETE, **more) -> Case:
    return Case(
        VALUE | dict(small), dict(quiet), VALUE_FEELS | dict(feels), VALUE_METRICS + metrics, world,
        **({"learns": CATCH} | more),
    )  # fmt: skip


def with_priorities(state, parts: dict) -> dict:
    return parts | {"priorities": state.priorities}


def draws_old_rows(state):
    """Priorities that leave new rows, which come with the largest so far, next to no chance."""
    return state._replace(priorities=state.priorities._replace(tree=1e6 * state.priorities.tree))


def with_proposal(state, parts: dict) -> dict:
    """The proposal apart from the rest of the network."""
    network = {name: x for name, x in parts["network"].items() if name != "proposal"}
    return parts | {"network": network, "proposal": parts["network"]["proposal"]}


def with_quantiles(state, parts: dict) -> dict:
    """PG-Rainbow's IQN beside PPO's parts."""
    return parts | {f"quantile_{name}": x for name, x in by_hand.parts(state.quantiles).items()}


# -- the rows ---------------------------------------------------------------------------------------------------------

CASES = {
    "sac": actor_critic(soft=True),
    "tqc": actor_critic(
        {"num_critics": 2, "num_quantiles": 5, "quantiles_dropped": 1},
        feels={"kappa": feels("critic_optimizer", "replay")}, metrics="truncation", soft=True,
    ),
    "td3": actor_critic(
        {"updates_per_iteration": 2},
        feels=TARGET_ACTOR_FEELS | {
            "target_noise": feels("critic_optimizer", "replay"),
            "target_noise_clip": feels("critic_optimizer", "replay"),
        },
        draws=True,
    ),
    "ddpg": actor_critic(
        feels=TARGET_ACTOR_FEELS | {
            "critic_weight_decay": feels("critic_optimizer"), "noise_reversion": feels("replay"),
        },
    ),
    "d4pg": actor_critic(
        {**SUPPORT, "num_steps": 1, "target_period": 20, "action_gradient_bound": 0.03},
        {"action_gradient_bound": 1.0},
        {
            "actor_learning_rate": only("actor"), "critic_learning_rate": feels("critic actor_optimizer", "replay"),
            "action_gradient_bound": feels("actor_optimizer", "critic critic_optimizer replay"),
            "v_min": feels("critic_optimizer", "replay"), "v_max": feels("critic_optimizer", "replay"),
        },
        "clipped_mass action_gradient_norm", polyak=False,
    ),
    "dsac": actor_critic(
        {"updates_per_iteration": 2, "target_bound": 0.5, "activation": "relu", "gradient_bias": 0.0},
        {"reward_scale": 1.0, "min_std": 0.1, "max_std": 3.0, "target_bound": 10.0},
        TARGET_ACTOR_FEELS | {
            name: feels("critic_optimizer", "replay")
            for name in ("reward_scale", "target_bound", "min_std", "max_std", "gradient_bias")
        },
        "std clipped_targets", soft=True, iterations=1200,
    ),
    "dsac_t": actor_critic(
        {"updates_per_iteration": 2, "bound_width": 0.5}, {"bound_width": 3.0},
        TARGET_ACTOR_FEELS | {
            name: feels("critic_optimizer", "replay") for name in ("bound_width", "running_rate", "gradient_bias")
        },
        "std running_std", soft=True, dead=("target_bound",),
    ),
    "stac": actor_critic(
        quiet={"pessimism": 0.0, "actor_dropout": 0.0, "critic_dropout": 0.0},
        feels={
            "target_entropy_per_action": only("log_temperature"),
            "pessimism": feels("critic_optimizer actor_optimizer"),
            "actor_dropout": feels("critic_optimizer actor_optimizer"), "critic_dropout": feels("critic_optimizer"),
        },
        metrics="std", soft=True,
    ),
    "dqn": value_based(feels={"huber_threshold": OF_THE_LOSS}),
    "c51": value_based(SUPPORT, feels=SUPPORT_FEELS, metrics="clipped_mass"),
    "ensemble_c51": value_based(
        SUPPORT | {"num_members": 2}, feels=SUPPORT_FEELS,
        metrics="clipped_mass return_of_member_0 return_of_member_1",
        learns=CATCH._replace(steps=60_000),  # 20,000 of each member
    ),
    # Its target is the mean over members, each of which has values of its own.
    "bootstrapped_dqn": value_based(
        {"num_members": 2, "prior_scale": 1.0, "mask_probability": 0.6}, {"prior_scale": 0.3, "mask_probability": 1.0},
        feels={
            "huber_threshold": OF_THE_LOSS, "prior_scale": feels("network optimizer"),
            "mask_probability": feels("network optimizer", "replay target_network"),
        },
        metrics="disagreement", learns=Learning("DeepSea-bsuite", 3_000, 0.9), draws=True,
    ),
    "os_c51": value_based(
        SUPPORT, feels=SUPPORT_FEELS, metrics="clipped_mass",
        learns=CATCH._replace(steps=40_000, at_least=0.7),  # slower than C51
    ),
    "qr_dqn": value_based(
        {"num_quantiles": 6}, feels={"kappa": OF_THE_LOSS}, metrics="crossings",
    ),
    "mmd_dqn": value_based(
        {"num_particles": 6}, feels={"bandwidth_exponent": OF_THE_LOSS}, metrics="spread",
    ),
    "md3qn": value_based(
        {"num_particles": 6}, feels={"bandwidth_exponent": OF_THE_LOSS}, metrics="spread", world=REWARDS,
        learns=Learning("multi_reward/branches", 20_000, 0.9),  # of 1
    ),
    "iqn": value_based(
        {"num_fractions": 5, "num_target_fractions": 6, "num_policy_fractions": 7, "cosines": 8},
        feels={"kappa": OF_THE_LOSS}, draws=True,
    ),
    "pe_dqn": value_based(
        SUPPORT | {
            "prior_scale": 0.3, "kappa": 0.5, "bonus_weight_start": 1.5, "bonus_weight_end": 1.2, "bonus_steps": 1000,
        },
        {"kappa": 1.0, "bonus_weight_start": 0.0, "bonus_weight_end": 0.0},
        feels=dict.fromkeys(("v_min", "v_max", "bonus_range", "prior_scale"), feels("network optimizer")) | {
            "kappa": OF_THE_LOSS, "bonus_weight_start": LATER, "bonus_weight_end": LATER,
        },
        metrics="clipped_mass disagreement bonus", learns=None,
    ),
    # Its target is the mean over networks, each of which has values of its own.
    "iterated_dqn": value_based(
        {"sync_period": 5}, feels={"huber_threshold": OF_THE_LOSS, "network_gradient_bound": OF_THE_LOSS}, draws=True,
        dead=("cosines", "num_fractions", "num_target_fractions", "num_policy_fractions", "kappa"),  # of its IQN
    ),
    "log_dqn": value_based(
        {"averaging_rate": 0.5, "smallest_value": 0.7, "huber_threshold": 0.1},
        {"smallest_value": 0.01, "huber_threshold": 1.0},
        dict.fromkeys(
            ("map_scale", "map_offset", "smallest_value", "averaging_rate", "value_bound", "huber_threshold"),
            OF_THE_LOSS,
        ),
        "cut_values", dead=("num_bands",),
    ),
    "fqf": value_based(
        {"num_fractions": 6, "cosines": 8},
        feels={
            "kappa": OF_THE_LOSS, "fraction_learning_rate": only("proposal"),
            "entropy_weight": feels("optimizer", "replay target_network"),
        },
        metrics="fraction_entropy", more_parts=with_proposal,
    ),
    "rainbow": value_based(
        SUPPORT | {"annealing_steps": 2000}, {"initial_noise": 0.05},  # evaluation takes the mean weights
        dict.fromkeys(("discount", "reward_clip", "v_min", "v_max"), only("network optimizer priorities")) | {
            "initial_noise": feels("network optimizer"), "priority_exponent": feels("priorities"),
            "importance_exponent": LATER,  # weights are all 1 at first
        },
        "clipped_mass", more_parts=with_priorities, old_rows=draws_old_rows, iterations=500, draws=True,
    ),
    # Observations of 0 are all alike to a layer norm: what is normalised are first biases, which takes its time.
    "pqn": Case(
        {name: ON_POLICY[name] for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches", "hidden")} | {
            "discount": DISCOUNT, "learning_rate": 1e-2, "gradient_bound": 0.1, "epsilon_start": 1.0,
            "epsilon_end": 0.5, "exploration_steps": 1000,
        },
        {"learning_rate": 3e-3, "gradient_bound": 10.0},
        dict.fromkeys(
            ("discount", "trace_decay", "reward_scale", "learning_rate", "gradient_bound"),
            feels("parameters", "interaction"),
        ) | {"epsilon_start": feels("parameters"), "epsilon_end": feels("", "others")},  # from the second rollout on
        VALUE_METRICS, DISCRETE, Learning("Catch-bsuite", 50_000, 0.9), replay=False,
    ),
    # One step per rollout: as many as PPO makes need more rollouts.
    "a2c": Case(
        {
            name: x for name, x in ON_POLICY.items() if name not in ("num_epochs", "num_minibatches", "learning_rate")
        } | {"learning_rate": 2e-3},
        {"entropy_weight": 0.0, "learning_rate": 1e-3},
        {name: felt for name, felt in ON_POLICY_FEELS.items() if name not in ("clip_range", "adam_epsilon")}
        | dict.fromkeys(("rmsprop_decay", "rmsprop_epsilon"), feels("parameters", "interaction")),
        EPISODES + ON_POLICY_METRICS, DISCRETE, Learning("CartPole-v1", 200_000, 475),
        replay=False, both=True, iterations=1500, dead=("adam_epsilon", "convolution"),
    ),
    "ppo": Case(
        ON_POLICY, ON_POLICY_QUIET, ON_POLICY_FEELS | {"target_kl": LATER},
        EPISODES + ON_POLICY_METRICS + "approximate_kl clipped_ratios updates_made", DISCRETE,
        Learning("CartPole-v1", 100_000, 400), replay=False, both=True, iterations=300,
        dead=("num_quantiles", "kappa", "risk", "convolution"),  # of laws, and of images: see its own tests
    ),
    "ppo_memory": Case(
        ON_POLICY | {"num_envs": 8, "num_minibatches": 2, "num_steps": 12, "hidden": (16,), "memory_size": 16},
        ON_POLICY_QUIET, ON_POLICY_FEELS, EPISODES + ON_POLICY_METRICS + "approximate_kl clipped_ratios", DISCRETE,
        Learning("MemoryChain-bsuite", 40_000, 0.9), replay=False, both=True, iterations=300, dead=("convolution",),
    ),
    # PPO's loss never reaches the IQN; its epsilon is that of both.
    "pg_rainbow": Case(
        ON_POLICY | {
            "num_quantiles": 5, "num_fractions": 5, "num_target_fractions": 6, "quantile_updates": 8, "batch_size": 32,
            "replay_capacity": 4096, "target_period": 4, "quantile_learning_rate": 5e-3, "quantile_hidden": (16, 16),
        },
        ON_POLICY_QUIET,
        dict.fromkeys(ON_POLICY_FEELS, feels("parameters", "interaction quantile_network quantile_optimizer")) | {
            "discount": feels("parameters quantile_optimizer", "interaction"),
            "adam_epsilon": feels("parameters quantile_network", "interaction"),
            "quantile_learning_rate": feels("parameters quantile_network", "interaction"),
            "kappa": feels("parameters quantile_optimizer", "interaction"),
        },
        EPISODES + ON_POLICY_METRICS
        + "approximate_kl clipped_ratios quantile_loss quantile_gradient_norm quantile_value",
        DISCRETE, None, replay=False, iterations=300, more_parts=with_quantiles, dead=("convolution",),
    ),
    "variance_reduced": Case(
        {"num_envs": 16, "horizon": LIMIT, "hidden": (16, 16), "discount": DISCOUNT, "step_length": 0.3}, {},
        {
            "discount": feels("parameters optimizer"), "step_length": only("parameters"),
            "step_exponent": LATER, "memory_exponent": LATER,  # the first iteration knows nothing of either
        },
        EPISODES + "loss utility entropy gradient_norm direction_norm share_of_new smallest_weight largest_weight",
        DISCRETE, Learning("CartPole-v1", 5_000_000, 450), replay=False, both=True,
        dead=("utility", "smoothing", "barrier_weight"),  # of other utilities: see its own tests
    ),
    "props": Case(
        # The first iteration has data of a rollout before it, and so its own behaviour policies.
        ON_POLICY | {"behaviour_period": 4, "behaviour_learning_rate": 0.05, "kl_weight": 0.5},
        ON_POLICY_QUIET | {"behaviour_learning_rate": 1e-3},
        ON_POLICY_FEELS | {"gradient_bound": feels("parameters"), "adam_epsilon": feels("parameters")} | dict.fromkeys(
            ("behaviour_learning_rate", "behaviour_clip_range", "behaviour_kl_bound", "kl_weight"), feels("behaviour"),
        ),
        EPISODES + ON_POLICY_METRICS + "approximate_kl clipped_ratios behaviour_kl behaviour_updates", DISCRETE,
        Learning("CartPole-v1", 100_000, 400), replay=False, both=True, iterations=300,
        dead=("ros_learning_rate", "convolution"),
        more_parts=lambda state, parts: parts | {"behaviour": state.behaviour},
    ),
    "rnd": Case(
        ON_POLICY | DISTILLED, ON_POLICY_QUIET | {"intrinsic_weight": 0.0}, ON_POLICY_FEELS | DISTILLED_FEELS,
        EPISODES + ON_POLICY_METRICS + DISTILLED_METRICS, DISCRETE, Learning("DeepSea-bsuite", 50_000, 0.9),
        replay=False, both=True, iterations=300, dead=("convolution",),
    ),
    "drnd": Case(
        ON_POLICY | DISTILLED | {"num_targets": 3, "distance_weight": 0.6}, ON_POLICY_QUIET | {"intrinsic_weight": 0.0},
        ON_POLICY_FEELS | DISTILLED_FEELS | {"distance_weight": feels("parameters", "interaction")},
        EPISODES + ON_POLICY_METRICS + DISTILLED_METRICS, DISCRETE, Learning("DeepSea-bsuite", 50_000, 0.9),
        replay=False, both=True, iterations=300, dead=("convolution",),
    ),
    "plr": Case(
        ON_POLICY | {"num_levels": 16, "robust": False}, ON_POLICY_QUIET,
        ON_POLICY_FEELS | dict.fromkeys(("replay_probability", "minimum_fill", "temperature", "staleness"), LATER),
        EPISODES + ON_POLICY_METRICS + "replays levels score", LEVELS, Learning("maze", 300_000, 0.7),
        replay=False, both=True, iterations=300, dead=("convolution",),
    ),
    "bc": Case(
        OFFLINE | {"learning_rate": 3e-3}, {}, {"learning_rate": only("parameters")},
        "loss action_error gradient_norm", CONTINUOUS, None, replay=False, both=True, data=best_and_noise,
        iterations=1400,
    ),
    # A temperature so low that the policy is that of the best actions, whose values the probes know.
    "iql": Case(
        OFFLINE | {
            "actor_learning_rate": 3e-3, "critic_learning_rate": 1e-2, "value_learning_rate": 1e-2, "polyak": 0.05,
            "discount": DISCOUNT, "actor_hidden": (16, 16), "critic_hidden": (16, 16), "weight_bound": 1.5,
        },
        {"inverse_temperature": 30.0, "weight_bound": 100.0},
        {
            "reward_scale": feels("critic_optimizer", "actor value"),
            "discount": feels("critic_optimizer", "actor value"),
            "expectile": feels("value_optimizer"), "inverse_temperature": only("actor actor_optimizer"),
            "weight_bound": LATER, "polyak": only("target_critic"), "actor_learning_rate": only("actor"),
            "critic_learning_rate": only("critic target_critic"),
            "value_learning_rate": feels("value critic_optimizer actor_optimizer"),
        },
        "value_loss actor_loss critic_loss value target advantage weight bounded_weights critic_gradient_norm",
        CONTINUOUS, None, replay=False, data=any_action, iterations=1800,
    ),
    # At first guidance changes few tokens, and in one iteration none for sure.
    "q_sharp": Case(
        SUPPORT | {
            "num_envs": 32, "pretraining": 0, "eta": 1.0, "roll_in": "guided", "width": 16, "num_blocks": 1,
            "num_heads": 2, "learning_rate": 1e-2, "gradient_bound": 0.05, "decoding": "greedy",
        },
        {"eta": 0.5, "gradient_bound": 1.0},  # a smaller eta would look at atoms above all rewards
        {
            "eta": LATER, "temperature": LATER, "learning_rate": only("value"),
            "gradient_bound": feels("value_optimizer", "reference reference_optimizer"),
            "v_min": feels("value value_optimizer", "reference reference_optimizer"),
            "v_max": feels("value value_optimizer", "reference reference_optimizer"),
        },
        VALUE_METRICS + "clipped_mass", TOKENS,
        Learning("token/tree", 51_200, 0.95), replay=False, iterations=350,
        # Of pretraining, of how it is evaluated, and of vocabularies that are larger: see its own tests.
        dead=("pretraining", "pretraining_batch", "pretraining_learning_rate", "weight_decay", "decoding", "top_k"),
    ),
    "decoupled_dqn": value_based(
        FACTORED_SMALL, FACTORED_QUIET, FACTORED_FEELS, world=FACTORED,
        learns=Learning("discretised/Pendulum-v1", 30_000, -250),
    ),
    # The first update finds the target network where the critics are: nothing is to be kept near.
    "revalued": value_based(
        FACTORED_SMALL | {"num_critics": 3, "regularisation": 0.5}, FACTORED_QUIET,
        FACTORED_FEELS | {"regularisation": LATER}, "regulariser disagreement", FACTORED,
        learns=Learning("factored", 10_000, 1.0),
    ),
    # The mean needs no stock, and must find the values that QR-DQN finds.
    "eta_dqn": value_based(
        {"num_quantiles": 6, "utility": "mean", "stock_scale": 50.0, "learning_rate": 3e-3},
        # Targets go on to stocks that were never seen: they must look alike.
        {"stock_scale": 1000.0},
        feels={
            "discount": feels("network optimizer"),  # the stock's too, and so what is stored
            "kappa": OF_THE_LOSS, "stock_scale": feels("network optimizer"),
        },
        metrics="crossings", iterations=1500,
        world=with_stock(), learns=None,
    ),
}  # fmt: skip


def row(name: str) -> Case:
    """The row of an agent that `jaxrl_dist` finds. Raises AssertionError where there is none."""
    assert name in CASES, f"tests/algorithms/cases.py has no row for {name}: every agent needs one"
    return CASES[name]


def module(name: str):
    return find_algorithm(name)
