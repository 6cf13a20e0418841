"""The measuring scripts run small on a CPU, and the floor holds the products of an update, no more and no less."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "throughput"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # they import each other from beside them


def test_products_of_a_function_by_hand(scripts):
    import floor

    left, right = jnp.ones((8, 3)), jnp.ones((3, 5))

    def function(left, right):
        once = left @ right
        many, _ = jax.lax.scan(lambda carry, _: (carry + left @ right, None), once, length=4)
        return jax.jit(lambda x: (x.T @ x).sum())(many)

    found = floor.products_of(function, left, right)
    assert sorted((p.left, p.right, p.times) for p in found) == [
        ((8, 3), (3, 5), 1), ((8, 3), (3, 5), 4), ((8, 5), (8, 5), 1),
    ]  # fmt: skip
    assert sorted(p.operations for p in found) == [2 * 8 * 3 * 5, 2 * 5 * 8 * 5, 4 * 2 * 8 * 3 * 5]
    # Gradients are products, too: forward, and one for each side.
    gradient = floor.products_of(jax.grad(lambda left, right: ((left @ right) ** 2).sum(), (0, 1)), left, right)
    assert len(gradient) == 3
    floor.program(found)(2)


def test_floor_does_every_product_of_dqn(scripts):
    import cases
    import floor

    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.value_based import dqn

    agent = dqn.make_agent(dqn.Config(**cases.VALUES), *envs.make("CartPole-v1"))
    state = jax.eval_shape(agent.init, jax.random.key(0))
    found = floor.products_of(agent.step, state)
    # Three layers: acting, target, forward, weights' gradients, and the inputs' but for the first layer's.
    assert len(found) == 3 + 3 + 3 + 3 + 2
    layers = 4 * 120 + 120 * 84 + 84 * 2
    assert sum(p.operations for p in found) == 2 * (layers + 128 * (3 * layers + 120 * 84 + 84 * 2))
    # Kept by the compiler, each of them: none is left out, merged, or cut to the one number that is read.
    text = floor.loop_of(found).lower(1).compile().as_text()
    assert text.count(" dot(") + text.count('"__ynn_fusion"') >= len(found)


def test_accelerator_runs_small(tmp_path):
    command = [
        sys.executable, FOLDER / "accelerator.py", "--runs", "1", "2", "--agents", "dqn", "--mjx-envs", "0",
        "--seconds", "0.05", "--out", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "accelerator.csv")
    assert table.seeds.tolist() == [1, 2]
    # 8 environments for one update
    np.testing.assert_allclose(table.env_steps_per_second, 8 * table.updates_per_second, atol=8)
    assert (table.updates_per_second > 0).all()
    assert json.loads((tmp_path / "accelerator.json").read_text())["left_out"] == []


def test_accelerator_says_what_time_left_out(tmp_path):
    command = [sys.executable, FOLDER / "accelerator.py", "--minutes", "0", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out after 0.0 minutes: ppo on CartPole-v1, 1 seeds;" in done.stdout
    assert len(json.loads((tmp_path / "accelerator.json").read_text())["left_out"]) == 19


def test_side_by_side_serves_ours_and_the_products(tmp_path):
    command = [
        sys.executable, FOLDER / "side_by_side.py", "--turns", "1", "--only", "DQN 120-84", "--out", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "side_by_side.csv").set_index("side")
    assert table.index.tolist() == ["ours", "ours, 1 core", "products", "products, 1 core"]
    assert table.seconds_by_ours["ours"] == 1
    assert (table.updates_per_second > 0).all()
