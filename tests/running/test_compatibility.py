"""Every algorithm starts with its defaults on every environment that it accepts, and says why not on all others.

Started: every setting checked, and all that a run would compile traced for its shapes. Nothing is compiled or run.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from gymnax.environments import spaces
from toys import Toy, ToyParams, agents

from jaxrl_dist import cli, envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.spaces import UnsupportedEnvironment
from jaxrl_dist.running import compatibility, evaluation, problem, training
from jaxrl_dist.running.problem import RunOptions, split_preset

MODULES = {name: cli.find_algorithm(name) for name in agents()}
ENVIRONMENTS = [env_id for ids in envs.available().values() for env_id in ids]
# Vectors and continuous actions, vectors of integers, images, a stock, levels, several choices at once, tokens: each
# takes another way through agents.
KINDS = (
    "Pendulum-v1", "FourRooms-misc", "Breakout-MinAtar", "stock/gamble", "maze", "multi_reward/coin", "factored",
    "token/tree",
)  # fmt: skip

every_algorithm = pytest.mark.parametrize("name", MODULES)
# Tracing brax takes its time.
SUBJECTS = ("algorithms", "envs", "jaxrl_dist/learning", "jaxrl_dist/running/compatibility.py", "constraints.txt")
RARELY = pytest.mark.slow, pytest.mark.proves(*SUBJECTS)
every_environment = pytest.mark.parametrize(
    "env_id", [pytest.param(i, marks=RARELY) if i.startswith("brax/") else i for i in ENVIRONMENTS]
)


@pytest.fixture(scope="module", autouse=True)
def _environments_are_made_once():
    make = envs.make
    kept = functools.cache(lambda env_id, options: make(env_id, **dict(options)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "make", lambda env_id, **options: kept(env_id, tuple(sorted(options.items()))))
        yield


def accepting(env_id: str) -> list[str]:
    return [name for name, module in MODULES.items() if not compatibility.refusal(module, *envs.make(env_id))]


def prepare(name: str, env_id: str) -> problem.Problem:
    """As the command line does it when it is given nothing but --env-id."""
    module = MODULES[name]
    of_the_run, of_the_algorithm = split_preset(module.PRESETS.get(env_id, {}))
    options = RunOptions(**{"env_id": env_id, **of_the_run})
    return problem.prepare(name, module.make_agent, module.Config(**of_the_algorithm), options)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def trace(agent, env, params) -> None:
    """Shapes of everything that a run makes of an agent."""
    key, batch = jax.eval_shape(lambda: jax.random.key(0)), 3
    state = jax.eval_shape(agent.init, key)
    after, metrics = jax.eval_shape(agent.step, state)
    assert types(after) == types(state)
    assert all(types(metric) == ((), jnp.float32) for metric in jax.tree.leaves(metrics))
    row = interaction.transition_like(env, params)
    observation = jax.ShapeDtypeStruct((batch, *row.observation.shape), row.observation.dtype)
    memory = jax.eval_shape(lambda: agent.policy.start(batch))
    action, remembered = jax.eval_shape(agent.policy.act, state, observation, memory, key)
    assert types(remembered) == types(memory)
    assert types(action) == ((batch, *row.action.shape), row.action.dtype)
    if jax.tree.leaves(memory):  # a policy that remembers is no file for numpy, and what is claimed is of none
        assert agent.export is None
    if agent.claim:  # there is none without a critic
        target_action, bonus = jax.eval_shape(agent.claim.policy, state, observation, key)
        assert types(target_action) == types(action)
        assert types(bonus) == ((batch,), jnp.float32)
        law = jax.eval_shape(agent.claim.law, state, observation, action)
        assert {x.shape[0] for x in jax.tree.leaves(law)} == {batch}
    if agent.export:
        assert jax.eval_shape(lambda state: numbers_of(agent.export(state)), state)


def numbers_of(exported):
    """What of an exported policy depends on the state: the rest says in words how to use it."""
    return {name: array for name, array in exported.items() if isinstance(array, jax.Array)}


@every_environment
def test_defaults_start_on_every_environment(env_id):
    """All algorithms that accept it are prepared, and one of them, another for each environment, takes its steps."""
    accepted = accepting(env_id)
    assert accepted
    problems = [prepare(name, env_id) for name in accepted]
    _, make_agent, config, env, params, *_ = problems[ENVIRONMENTS.index(env_id) % len(accepted)]
    assert jax.eval_shape(make_agent(config, env, params).init, jax.eval_shape(lambda: jax.random.key(0)))


@every_algorithm
def test_defaults_start_on_every_kind_of_environment(name):
    accepted = [env_id for env_id in KINDS if name in accepting(env_id)]
    assert accepted
    for env_id in accepted[:2]:
        _, make_agent, config, env, params, *_ = prepare(name, env_id)
        trace(make_agent(config, env, params), env, params)


def test_warmup_leaves_steps_to_learn_in():
    """Even the longest warm-up: TD3's paper takes 25,000 steps, more than a run has by default."""
    prepared = prepare("td3", "MountainCarContinuous-v0")
    assert prepared.config.warmup_steps == 25_000
    assert prepared.options.total_steps == 50_000
    assert prepare("sac", "MountainCarContinuous-v0").options.total_steps == 20_000
    short, long = (MODULES["sac"].Config(warmup_steps=steps) for steps in (100, 30_000))
    assert problem.with_total_steps(RunOptions(), short, long).total_steps == 60_000, "one total for a whole study"
    assert problem.with_total_steps(RunOptions(total_steps=7), short, long).total_steps == 7


# -- what accepts what ------------------------------------------------------------------------------------------------


def test_matrix_of_support():
    refusals = compatibility.refusals(MODULES, ["CartPole-v1", "Pendulum-v1", "brax/hopper", "stock/gamble"])
    assert refusals["CartPole-v1"]["qr_dqn"] == refusals["Pendulum-v1"]["tqc"] == refusals["brax/hopper"]["td3"] == ""
    assert refusals["stock/gamble"]["eta_dqn"] == refusals["stock/gamble"]["dqn"] == ""
    assert refusals["CartPole-v1"]["ddpg"] == refusals["stock/gamble"]["sac"] == "actions are discrete"
    assert refusals["Pendulum-v1"]["rainbow"] == refusals["brax/hopper"]["dqn"] == "actions are continuous"
    assert refusals["CartPole-v1"]["eta_dqn"] == "observations hold no stock"
    refusals = compatibility.refusals(MODULES, ["factored", "discretised/Pendulum-v1"])
    assert {name for name, why in refusals["factored"].items() if not why} == {"decoupled_dqn", "revalued"}
    assert refusals["factored"] == refusals["discretised/Pendulum-v1"]


def test_brax_environments_are_what_the_matrix_takes_them_for():
    """The matrix does not load them; `test_defaults_start_on_every_environment` sees that each is accepted."""
    (listed,) = compatibility.refusals(MODULES, ["brax/fast"]).values()
    env, params = envs.make("brax/fast")
    assert listed == {name: compatibility.refusal(module, env, params) for name, module in MODULES.items()}


# -- spaces that are refused ------------------------------------------------------------------------------------------


class Odd(Toy):
    """The toy environment with other spaces."""

    name = "Odd"

    def __init__(self, action_space=None, observation_space=None):
        self.spaces = action_space or super().action_space(None), observation_space or super().observation_space(None)

    def action_space(self, params):
        return self.spaces[0]

    def observation_space(self, params):
        return self.spaces[1]


class MultiDiscrete:
    """As Gymnasium has it; gymnax has none."""

    def __init__(self, *nvec, start=0):
        self.nvec, self.shape, self.dtype, self.start = nvec, (len(nvec),), jnp.int32, start


class FromOne(spaces.Discrete):
    start = 1


BOX, CHOICE = spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(3)
REFUSED_BY_ALL = {
    "observations are a dict": (None, spaces.Dict({"place": BOX})),
    "observations are a tuple": (None, spaces.Tuple((BOX, BOX))),
    "observations are discrete": (None, spaces.Discrete(16)),
    "observations are several choices at once": (None, MultiDiscrete(2, 3)),
    r"observations have shape \(\)": (None, spaces.Box(0, 1, ())),
    r"observations have shape \(0,\)": (None, spaces.Box(0, 1, (0,))),
    r"observations have shape \(2, 3, 3, 1\)": (None, spaces.Box(0, 1, (2, 3, 3, 1))),
    "actions are a dict": (spaces.Dict({"left": BOX, "right": BOX}), None),
    "actions are a tuple": (spaces.Tuple([CHOICE, CHOICE]), None),
    "actions are integers": (spaces.Box(0, 255, (2,), jnp.int32), None),
}
REFUSED_BUT_BY_FACTORED = {"actions are several choices at once": (MultiDiscrete(2, 3), None)}
REFUSED_BY_CONTINUOUS = {
    "actions are discrete": (CHOICE, None),
    r"observations have shape \(4, 4\)": (None, spaces.Box(0, 1, (4, 4))),
    r"bounds -inf to inf": (spaces.Box(-jnp.inf, jnp.inf, (2,)), None),
    r"bounds \[-1.0, 0.0\] to inf": (spaces.Box(jnp.array([-1.0, 0.0]), jnp.inf, (2,)), None),
    r"bounds -3.40282e\+38 to 3.40282e\+38": (spaces.Box(-3.4028235e38, 3.4028235e38, (2,)), None),
    r"bounds 1 to 1": (spaces.Box(1.0, 1.0, (2,)), None),
    r"actions have shape \(\)": (spaces.Box(-1.0, 1.0, ()), None),
    r"actions have shape \(2, 2\)": (spaces.Box(-1.0, 1.0, (2, 2)), None),
}
REFUSED_BY_DISCRETE = {
    "actions are continuous": (BOX, None),
    "actions begin at 1": (FromOne(3), None),
    "actions are 0 in number": (spaces.Discrete(0), None),
    r"images have shape \(2, 8, 3\)": (CHOICE, spaces.Box(0, 1, (2, 8, 3))),
}
REFUSED_BY_FACTORED = {
    "actions are continuous": (BOX, None),
    "actions are discrete": (CHOICE, None),
    r"actions are of \[3, 0\] choices": (MultiDiscrete(3, 0), None),
    r"actions have shape \(1, 2\)": (MultiDiscrete([3, 2]), None),
    r"actions have shape \(0,\)": (MultiDiscrete(), None),
    r"actions begin at \[0, 1\]": (MultiDiscrete(3, 2, start=[0, 1]), None),
    r"observations have shape \(4, 4\)": (None, spaces.Box(0, 1, (4, 4))),
}


@every_algorithm
def test_other_spaces_are_refused_by_what_they_are(name):
    module = MODULES[name]
    continuous, discrete = (  # algorithms that also need levels look at spaces first
        not compatibility.refusal(module, *envs.make(env_id)).startswith("actions are")
        for env_id in ("Pendulum-v1", "CartPole-v1")
    )
    factored = not (continuous or discrete)
    own = {} if continuous and discrete else REFUSED_BY_CONTINUOUS if continuous else REFUSED_BY_DISCRETE
    own = REFUSED_BY_FACTORED if factored else REFUSED_BUT_BY_FACTORED | own
    taken = BOX if continuous else MultiDiscrete(2, 3) if factored else CHOICE
    for why, (action_space, observation_space) in {**REFUSED_BY_ALL, **own}.items():
        env = Odd(action_space or taken, observation_space)
        train = training.make_train(module.make_agent, module.Config(), env, ToyParams(), total_steps=60_000)
        with pytest.raises(UnsupportedEnvironment, match=f"--env-id is Odd, whose .*{why}.*; this algorithm") as error:
            jax.eval_shape(train, jax.random.key(0))
        assert "\n" not in str(error.value)
        assert isinstance(error.value, ConfigurationError)


@pytest.mark.parametrize("why", ["a dict", "a tuple", "integers"])
def test_only_floats_are_rescaled(why):
    action_space, _ = REFUSED_BY_ALL[f"actions are {why}"]
    with pytest.raises(ValueError, match=f"actions of Odd are {why}, allowed: one choice .* or several .*, or floats"):
        envs.rescale_actions(Odd(action_space), ToyParams())


def test_several_choices_at_once_stay_as_they_are():
    env = Odd(MultiDiscrete(2, 3))
    assert envs.rescale_actions(env, ToyParams()) is env


# -- spaces and observations that are accepted ------------------------------------------------------------------------


class BuiltByJax(Toy):
    """Bounds that jnp makes, as gymnax's Swimmer and Reacher have them: tracers where an agent is traced."""

    def action_space(self, params):
        return spaces.Box(-jnp.ones(2), jnp.ones(2), (2,))


class Typed(Toy):
    """Observations of another type."""

    def __init__(self, dtype, discrete):
        self.dtype, self.discrete = dtype, discrete

    def action_space(self, params):
        return spaces.Discrete(3) if self.discrete else super().action_space(params)

    def observation_space(self, params):
        return spaces.Box(0, 1, (3,), self.dtype)

    def observe(self, state):
        return super().observe(state).astype(self.dtype)


def warmup_of(agent):
    return agent.clock.warmup_steps


def test_bounds_are_read_outside_of_the_trace():
    module = MODULES["sac"]
    assert jax.jit(lambda: warmup_of(module.make_agent(module.Config(), BuiltByJax(), ToyParams())))() == 10_000

    class Depends(Toy):
        def action_space(self, params):
            return spaces.Box(-params.noise, params.noise, (2,))

    with pytest.raises(UnsupportedEnvironment, match="bounds that depend on traced parameters"):
        jax.vmap(
            lambda noise: module.make_agent(module.Config(), Depends(), ToyParams(noise=noise)).clock.warmup_steps
        )(jnp.ones(2))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.bool_, jnp.float16])
@pytest.mark.parametrize(("name", "settings"), [("sac", {"normalize_observations": True}), ("iqn", {})])
def test_observations_of_any_type(name, settings, dtype):
    env, module = Typed(dtype, name == "iqn"), MODULES[name]
    trace(module.make_agent(module.Config(**settings), env, ToyParams()), env, ToyParams())


# -- time limits ------------------------------------------------------------------------------------------------------


@every_environment
def test_time_limits_that_mean_nothing_else_are_lifted(env_id):
    """DiscountingChain shows which part of the limit has passed: lifted, it would show something else."""
    why = evaluation.limited_because(*envs.make(env_id))
    assert why == ("" if env_id != "DiscountingChain-bsuite" else evaluation.LIMIT_HAS_ANOTHER_MEANING)
