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
        ((5, 8), (8, 5), 1), ((8, 3), (3, 5), 1), ((8, 3), (3, 5), 4),
    ]  # fmt: skip
    assert sorted(p.operations for p in found) == [2 * 8 * 3 * 5, 2 * 5 * 8 * 5, 4 * 2 * 8 * 3 * 5]
    # Gradients are products, too: forward, and one for each side.
    gradient = floor.products_of(jax.grad(lambda left, right: ((left @ right) ** 2).sum(), (0, 1)), left, right)
    assert len(gradient) == 3
    floor.program(found)(2)


def test_floor_does_every_product_of_dqn(scripts):
    import floor
    import workloads

    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.value_based import dqn

    agent = dqn.make_agent(dqn.Config(**workloads.VALUES), *envs.make("CartPole-v1"))
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
        sys.executable, FOLDER / "accelerator.py", "--runs", "2", "--agents", "dqn", "--mjx-envs", "0",
        "--seconds", "0.05", "--out", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "accelerator.csv")
    assert table.seeds.tolist() == [2]
    # 8 environments for one update
    np.testing.assert_allclose(table.env_steps_per_second, 8 * table.updates_per_second, atol=8)
    assert (table.updates_per_second > 0).all()
    assert json.loads((tmp_path / "accelerator.json").read_text())["left_out"] == []


def test_accelerator_says_what_time_left_out(scripts, tmp_path, capsys):
    import accelerator

    accelerator.main(minutes=0, out=tmp_path)
    assert "left out after 0 minutes: ppo on CartPole-v1, 1 seeds;" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "accelerator.json").read_text())["left_out"]) == 19


def test_ours_and_its_products_are_served(scripts, monkeypatch, capsys):
    import serve

    for what in ("ours", "floor"):
        asked = [{"compile": "DQN 120-84"}, {"run": 3}, {"run": 5}]
        monkeypatch.setattr(sys, "stdin", map(json.dumps, asked))
        serve.main(what)
        compiled, *runs = map(json.loads, capsys.readouterr().out.splitlines())
        assert compiled["updates"] == 1
        assert all(answer["seconds"] > 0 for answer in (compiled, *runs))
    monkeypatch.setattr(sys, "stdin", [json.dumps({"compile": "DQN 120-84, 4 seeds"})])
    serve.main("floor")
    assert json.loads(capsys.readouterr().out)["missing"] == "floor has no DQN 120-84, 4 seeds"


class Pretended:
    """A side that takes so many seconds for an update, and twice as many of the CPU."""

    def __init__(self, seconds: float | None, updates: int = 1, iterations: int | None = None):
        self.seconds, self.updates, self.iterations = seconds, updates, iterations

    def ask(self, compile: str = "", run: int = 0) -> dict:
        if compile:
            missing = {} if self.seconds else {"missing": "not there"}
            return {"seconds": 1.0, "updates": self.updates, "iterations": self.iterations} | missing
        assert self.iterations is None or run == self.iterations
        return {"seconds": self.seconds * run * self.updates, "cpu_seconds": 2 * self.seconds * run * self.updates}


def test_sides_are_compared_by_their_updates(scripts):
    import side_by_side

    sides = {"ours": Pretended(0.01), "seeds": Pretended(0.02, updates=4), "none": Pretended(None)}
    sides["whole"] = Pretended(0.005, updates=0.5, iterations=100)
    rows = pd.DataFrame(side_by_side.compare("a case", sides, turns=3)).set_index("side")
    assert rows.index.tolist() == ["ours", "seeds", "whole"]
    assert rows.updates_per_second.tolist() == [100, 50, 200]
    assert rows.updates_per_cpu_second.tolist() == [50, 25, 100]
    assert rows.seconds_by_ours.tolist() == [1, 2, 0.5]


def test_parts_of_an_on_policy_iteration(tmp_path):
    command = [
        sys.executable, FOLDER / "on_policy.py", "--environments", "CartPole-v1", "--seeds", "1", "2",
        "--repetitions", "1", "--seconds", "0.02", "--out", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, two = pd.read_csv(tmp_path / "on_policy.csv").to_dict("records")
    assert (alone["seeds"], two["seeds"]) == (1, 2)
    # The parts of one run alone: the reverse scan within the advantages, both beside the rollout.
    assert 0 <= alone["share_gae"] <= alone["share_advantages"]
    assert alone["share_rollout"] > 0
    assert np.isnan(two["share_rollout"])
    assert json.loads((tmp_path / "on_policy.json").read_text())["cores"] >= 1
