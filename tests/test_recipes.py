"""CONTRIBUTING's recipes, followed: a copied file with a line changed, in a family of its own, is found and trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from gymnax.environments import spaces
from toys import Toy

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the house in which somebody followed the recipes for a family and an algorithm."""
    there = tmp_path_factory.mktemp("house")
    for file in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, there)
    for folder in ("jaxrl_dist", "algorithms", "envs", "tests"):
        shutil.copytree(ROOT / folder, there / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("algorithms", "envs"):  # as they are installed
        (there / "jaxrl_dist" / folder).symlink_to(there / folder)
    family = there / "algorithms" / "patient"
    family.mkdir()
    (family / "__init__.py").write_text('"""Agents that look far ahead."""\n')
    source = (there / "algorithms" / "actor_critic" / "sac.py").read_text()
    changed = source.replace("    num_critics: Count = 2\n", "    num_critics: Count = 7\n")
    assert changed != source
    (family / "patient_sac.py").write_text(changed)
    return there


def start(house: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in the copy, which finds its own house and no installed one."""
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path.insert(0, {str(house)!r}); {program}"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], cwd=house, env=environment, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


def run(house: Path, *arguments: str) -> str:
    done = start(house, "from jaxrl_dist.cli import command; command(sys.argv[1:])", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def suite(house: Path, *arguments: str) -> subprocess.CompletedProcess:
    return start(
        house, "import pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-p", "no:cacheprovider", *arguments,
        "tests/algorithms/test_every_agent.py",
    )  # fmt: skip


def test_a_copied_file_in_a_new_family_is_found_and_trains(house):
    helped = run(house, "train", "patient_sac", "--help")
    assert "(default: 7)" in helped
    said = run(
        house, "train", "patient_sac", "--total-steps", "120", "--warmup-steps", "64", "--batch-size", "16",
        "--num-seeds", "1", "--actor-hidden", "8", "--critic-hidden", "8", "--eval-episodes", "1", "--eval-states", "0",
        "--plots", "False", "--name", "mine", "--preset", "none",
    )  # fmt: skip
    assert "patient_sac on Pendulum-v1" in said
    assert (house / "runs" / "patient_sac" / "Pendulum-v1" / "mine" / "policies" / "seed_0.npz").is_file()


def test_the_suite_fails_without_a_row_and_with_one_it_tests_the_file(house):
    without = suite(house, "--collect-only")
    assert without.returncode != 0
    assert "cases.py has no row for patient_sac: every agent needs one" in without.stdout
    cases = house / "tests" / "algorithms" / "cases.py"
    row = '    "sac": actor_critic(soft=True),\n'
    assert row in cases.read_text()
    cases.write_text(cases.read_text().replace(row, row + row.replace("sac", "patient_sac")))
    found = suite(house, "--collect-only", "-k", "patient_sac")
    for name in ("test_probes", "test_every_float_does_what_it_says", "test_runs_depend_on_their_key_alone"):
        assert f"{name}[patient_sac]" in found.stdout, found.stdout
    passed = suite(house, "-k", "patient_sac and (range or refused or lengths) or every_algorithm_is_tested")
    assert passed.returncode == 0, passed.stdout + passed.stderr


class Coin:
    """The recipe for an environment: guess a coin, ten times."""

    name = "Coin"
    default_params = Toy.default_params

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (1,))

    def reset(self, key, params):
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action, params):
        coin = jax.random.bernoulli(key).astype(jnp.int32)
        time = state + 1
        last = time == 10
        observation = jnp.ones(1) * coin
        info = {"final_observation": observation, "cost": 1.0 * coin}
        return (
            jnp.where(last, 0.0, observation),
            jnp.where(last, 0, time),
            1.0 * (action == coin),
            last,
            last & False,
            info,
        )


def test_an_environment_is_passed_to_training_as_it_is():
    from jaxrl_dist.algorithms.value_based import qr_dqn
    from jaxrl_dist.running import training

    config = qr_dqn.Config(
        num_envs=2,
        warmup_steps=32,
        replay_capacity=64,
        batch_size=8,
        hidden=(8,),
        num_quantiles=4,
        exploration_steps=32,
    )
    env = Coin()
    train = training.make_train(
        qr_dqn.make_agent, config, env, env.default_params, total_steps=64, evaluations=1, eval_episodes=4,
        eval_max_steps=10,
    )  # fmt: skip
    states, history = jax.jit(train)(jax.random.key(0))
    assert (history["evaluation_return"] <= 10).all()
    assert states.experience.replay.rows.extras["cost"].shape == (64,), "extras go with every stored transition"
