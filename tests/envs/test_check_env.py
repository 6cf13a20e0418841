import jax
import pytest
from toy_environments import BROKEN, BoundsByJax, DeterministicLine, Line, ShowsLimit, WeakTime

from jaxrl_dist.envs import EnvironmentCheckError, available, check, check_env, make
from jaxrl_dist.envs.probe import probe_params


@pytest.mark.parametrize("environment", [Line, DeterministicLine, BoundsByJax])
def test_correct_environments_pass_without_warning(environment):
    assert check_env(environment()) == []


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_every_broken_rule_is_named(broken):
    with pytest.raises(EnvironmentCheckError) as error:
        check_env(broken())
    assert broken.__doc__ in str(error.value)


def test_weak_types_are_a_warning():
    (warning,) = check_env(WeakTime())
    assert "state" in warning
    assert "compiles twice" in warning


def test_a_time_limit_with_another_meaning_is_a_warning():
    class PaysByLimit(ShowsLimit):
        part = "reward"

    (warning,) = check_env(PaysByLimit())
    assert "calibration will be off" in warning


def test_missing_methods_are_named_together():
    class Empty:
        name = "Empty"
        reset = None

    with pytest.raises(EnvironmentCheckError) as error:
        check_env(Empty())
    for name in ("default_params", "step", "action_space", "observation_space"):
        assert f"'{name}'" in str(error.value)
    assert "'reset'" not in str(error.value)


def test_several_findings_come_in_one_error():
    class TwoFaults(Line):
        def step(self, *arguments):
            observation, state, _, terminated, truncated, info = super().step(*arguments)
            return observation, state, jax.numpy.int32(0), terminated.astype(float), truncated, info

    with pytest.raises(EnvironmentCheckError, match="reward is int32") as error:
        check_env(TwoFaults())
    assert "terminated is float32" in str(error.value)
    assert isinstance(error.value, ValueError)


def test_what_could_not_be_checked_is_said():
    env, params = make("probe", case="constant")  # every episode is one step long
    assert any("time limit not checked" in warning for warning in check_env(env, params))


@pytest.mark.parametrize("case", ["discounting", "time_limit", "final_observation"])
def test_probe_passes(case):
    env, _ = make("probe")
    assert [w for w in check_env(env, probe_params(case)) if "not checked" not in w] == []


def test_probe_with_discrete_actions_passes():
    env, params = make("probe", discrete_actions=3, case="time_limit")
    assert check_env(env, params) == []


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_gymnax_environments_pass(env_id):
    env, params = make(env_id)
    assert all("compiles twice" in warning for warning in check_env(env, params))


# Where gymnax 1.0.1 breaks the contract. None of it reaches an agent: `interaction` casts rewards and states to types
# that stay, and reads the type of observations from what the environment returns rather than from its space.
KNOWN = {
    "Catch-bsuite": "observation is float32[10, 5], but observation_space is",
    "FourRooms-misc": "observation is int32[4], but observation_space is",
    "UmbrellaChain-bsuite": "reward is int32[], allowed",
    "BernoulliBandit-misc": "reward is int32[], allowed",
}


LIGHT = [i for ids in available().values() for i in ids if not i.startswith(("brax/", "mujoco/"))]


@pytest.mark.parametrize("env_id", LIGHT)
def test_types_of_every_listed_environment(env_id):
    found = list(check._types(*make(env_id), warnings := []))
    assert len(found) == (env_id in KNOWN)
    assert all(KNOWN[env_id] in finding for finding in found)
    assert all("state is weakly typed" in warning for warning in warnings)


@pytest.mark.slow
@pytest.mark.proves("envs", "constraints.txt")
@pytest.mark.parametrize("env_id", ["brax/hopper", "brax/inverted_pendulum"])
def test_brax_environments_pass_without_warning(env_id):
    env, params = make(env_id)
    assert check_env(env, params) == []
