"""The deep sea's experiment counts places, goes on where it was cut, and has settings that can be compared."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd
import pytest

from jaxrl_dist import envs
from jaxrl_dist.learning import interaction

FOLDER = Path(__file__).parents[2] / "experiments" / "deep_sea"
specification = importlib.util.spec_from_file_location("deep_sea", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_places_are_counted_once_and_over_episodes():
    env, params = envs.make("DeepSea-bsuite", size=4)
    env, params = experiment.Watched(env), params.replace(randomize_actions=False)

    @jax.jit
    def lived(key, actions):
        start_key, *keys = jax.random.split(key, 1 + len(actions))
        now, found = interaction.start(env, params, start_key, 1), []
        for action, one in zip(actions, keys, strict=True):
            now = interaction.step(env, params, now, action[None], one)[0]
            found.append(now)
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    # Two episodes to the right, of four places each, then one step to the left.
    after = lived(jax.random.key(0), jnp.array([1] * 8 + [0]))
    assert [*experiment.places_visited(after)] == [2, 3, 4, 4, 4, 4, 4, 4, 5]


def test_methods_of_a_family_have_the_same_settings():
    found = {method: experiment.settings(method, 9_000)[1] for method in ("PE-DQN", "DQN", "RND", "PPO")}
    for field in ("num_envs", "updates_per_iteration", "batch_size", "learning_rate", "hidden", "target_period"):
        assert found["PE-DQN"][field] == found["DQN"][field]
    assert (found["PE-DQN"]["bonus_steps"], found["DQN"]["exploration_steps"]) == (3_000, 3_000)
    assert (found["PE-DQN"]["epsilon_start"], found["DQN"]["epsilon_start"]) == (0, 1)
    assert found["RND"]["num_steps"] == found["PPO"]["num_steps"]


@pytest.mark.slow
@pytest.mark.proves("experiments/deep_sea", "jaxrl_dist", "algorithms/value_based")
def test_measures_writes_and_goes_on(tmp_path, monkeypatch):
    small = {"hidden": (8,), "num_atoms": 5, "batch_size": 16, "warmup_steps": 16}
    for method in ("PE-DQN", "DQN"):
        name, own = experiment.METHODS[method]
        monkeypatch.setitem(experiment.METHODS, method, (name, own | small))
    monkeypatch.setattr(experiment.cli, "spread_over_cores", lambda most=None: None)
    options = {"num_seeds": 2, "steps_per_cell": 10, "evaluations": 2, "out": tmp_path}
    experiment.main(sizes=(3,), methods=("PE-DQN",), **options)
    first = pd.read_csv(tmp_path / "results.csv")
    assert [*first.env_steps] == [53, 53, 90, 90]
    assert first.visited.between(3, 6).all()
    assert (first.bonus > 0).all()

    run, new = experiment.trained, []
    monkeypatch.setattr(
        experiment, "trained", lambda size, method, *rest: new.append(method) or run(size, method, *rest)
    )
    experiment.main(sizes=(3,), methods=("PE-DQN", "DQN"), **options)
    assert new == ["DQN"]  # the other one is known
    results = pd.read_csv(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(results[:4], first)
    assert results.bonus[4:].isna().all()
    assert [*pd.read_csv(tmp_path / "summary.csv").method] == ["PE-DQN", "DQN"]
    cells = json.loads((tmp_path / "run.json").read_text())["cells"]
    assert [*cells] == ["PE-DQN, 3", "DQN, 3"]
    assert cells["DQN, 3"]["settings"]["exploration_steps"] == 30
    for name in ("figure.png", "exploration.png"):
        assert (tmp_path / name).stat().st_size > 5_000
