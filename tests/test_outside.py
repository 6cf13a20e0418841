"""What users bring along is found by file or module, and what is wrong with it is said in one line."""

import numpy as np
import pytest

from jaxrl_dist import envs, outside
from jaxrl_dist.agent import Policy
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning import datasets
from jaxrl_dist.running import collecting

CONTROLLER = "jaxrl_dist.envs.controllers:pendulum"


def test_names_of_ours_stay_and_files_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outside.absolute("brax/hopper") == outside.shown("brax/hopper") == "brax/hopper"
    assert outside.absolute("here/walk.py:Walk") == f"{tmp_path}/here/walk.py:Walk"
    assert outside.shown(f"{tmp_path}/here/walk.py:Walk") == "walk.py:Walk"
    assert outside.absolute("module:name") == "module:name"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("three = 3", "thre", r"has no 'thre'; did you mean three\?"),
        ("three = 3", "three", "a int, which is no environment"),
        ("import nothing_of_this_name", "Walk", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
        ("class Walk: name = 'walk'", "Walk", "makes a Walk, which is no environment: it has no default_params, reset"),
    ],
)
def test_what_is_no_environment_is_said(tmp_path, text, name, message):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as error:
        envs.make(f"{file}:{name}")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match="there is no file"):
        envs.make(f"{tmp_path}/gone.py:Walk")


def test_an_environment_of_a_module_takes_options():
    env, params = envs.make("jaxrl_dist.envs.comb_lock:CombLock", horizon=3, max_steps_in_episode=7)
    assert (env.horizon, params.max_steps_in_episode) == (3, 7)


def test_a_controller_writes_episodes_that_are_of_its_environment_alone(tmp_path):
    source = collecting.of_controller(CONTROLLER, "Pendulum-v1", ("max_steps_in_episode=9",))
    assert isinstance(source.policy, Policy)
    from rich.console import Console

    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for file in files:
        behaviour = collecting.Behaviour((1.0, 0.0), 0.1)
        collecting.write(source, file, behaviour, Console(quiet=True), episodes=5, seed=3)
    assert datasets.digest(files[0]) == datasets.digest(files[1])
    data = datasets.load(files[0])
    assert data.reward.shape == (45,)
    np.testing.assert_array_equal(np.flatnonzero(data.truncated), np.arange(8, 45, 9))
    assert not data.terminated.any()
    inside = ~data.truncated[:-1]
    np.testing.assert_array_equal(data.next_observation[:-1][inside], data.observation[1:][inside])
    assert np.abs(data.action).max() <= 1
    assert datasets.about(files[0])["env_id"] == "Pendulum-v1"
    env, params = envs.make("CartPole-v1")
    with pytest.raises(ConfigurationError, match="which is of Pendulum-v1; --env-id is CartPole-v1"):
        datasets.require_of(data, env, params, files[0], "CartPole-v1")
