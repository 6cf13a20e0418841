"""PLR: whole iterations against a list of levels and losses in numpy, and which levels it learns from."""

import itertools

import by_hand
import clipped_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.environment_design import plr
from jaxrl_dist.envs.maze import Maze
from jaxrl_dist.learning import levels, portable, returns

ENV = Maze(size=3, view=3, walls=2)
PARAMS = ENV.default_params.replace(max_steps_in_episode=4, time_scale=4.0)
TINY = {
    "num_envs": 3, "num_steps": 10, "num_epochs": 2, "num_minibatches": 3, "num_levels": 7, "hidden": (6, 5),
    "learning_rate": 0.02, "replay_probability": 0.5, "clip_range": 0.05,
}  # fmt: skip


def agent_of(**settings):
    config = plr.Config(**(TINY | settings))
    return plr.make_agent(config, ENV, PARAMS), config


def rows_of(tree, count):
    """Every level as bytes."""
    return [b"".join(np.asarray(x[i]).tobytes() for x in jax.tree.leaves(tree)) for i in range(count)]


@pytest.mark.parametrize(("robust", "score"), [(True, "maximum_monte_carlo"), (False, "positive_value_loss")])
def test_iterations_equal_loops_in_numpy(robust, score, monkeypatch):
    """Twelve iterations, new levels and replayed ones; what was lived is taken from the program, the rest is numpy."""
    agent, config = agent_of(robust=robust, score=score)
    seen, plain = [], plr.rollouts.collect

    def recorded(env, level, *arguments, **options):
        now, rollout, episodes = plain(env, level, *arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), (level, rollout), ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(plr.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(4))
    parameters = clipped_by_hand.flat(state.learner.parameters)
    adam, kinds, completed = clipped_by_hand.Adam(parameters), [], []
    known = {}  # level -> (score, largest return)
    for _ in range(12):
        keys = jax.random.split(jax.random.clone(state.key), 7)
        before = by_hand.with_fresh_keys(state)
        state, metrics = step(state)
        jax.effects_barrier()
        level, (lived, (action, log_density)) = seen[-1]
        names, old = rows_of(level, 3), rows_of(before.levels.level, int(before.levels.size))
        replays = bool(metrics["replays"].total)
        kinds.append(replays)
        if replays:
            assert before.levels.size >= 4  # half of 7 places
            assert len(set(names)) == 3
            assert set(names) <= set(old)
        else:
            jax.tree.map(
                np.testing.assert_array_equal, level, jax.vmap(ENV.sample_level, (0, None))(
                    jax.random.split(keys[2], 3), PARAMS
                ),
            )  # fmt: skip

        # Every environment stays in its level from the start on.
        network = clipped_by_hand.part(parameters, "critic")
        value, following = (
            clipped_by_hand.tanh_forward(network, x.astype(np.float64))[-1][..., 0]
            for x in (lived.observation, lived.next_observation)
        )
        advantage = np.asarray(returns.gae(
            *map(jnp.asarray, (lived.reward, value, following, lived.terminated, lived.truncated)), config.discount,
            config.gae_decay,
        ), np.float64)  # fmt: skip

        # Scores by loops over the episodes that were completed.
        done, scores, largest = lived.terminated | lived.truncated, [], []
        for i in range(3):
            ends = [0, *(np.flatnonzero(done[:, i]) + 1)]
            parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
            completed.append(len(parts))
            best = max([lived.reward[part, i].sum() for part in parts], default=-np.inf)
            if replays:
                best = max(best, known[names[i]][1])
            gain = np.maximum(advantage, 0) if score == "positive_value_loss" else best - value
            scores.append(np.mean([gain[part, i].mean() for part in parts]))
            largest.append(best)
        after = rows_of(state.levels.level, int(state.levels.size))
        if replays:
            assert after == old
            known |= {name: found for name, *found in zip(names, scores, largest, strict=True)}
        else:
            buffer = levels.insert(
                before.levels, level, *(jnp.asarray(x, jnp.float32) for x in (scores, largest)), config.temperature,
                config.staleness,
            )  # fmt: skip
            assert after == rows_of(buffer.level, int(buffer.size))
            np.testing.assert_array_equal(state.levels.last_seen, buffer.last_seen)
            for name, *found in zip(names, scores, largest, strict=True):
                if name in old:
                    found[1] = max(found[1], known[name][1])
                known[name] = found
        assert state.levels.time == before.levels.time + 1
        so_far = np.maximum(before.interaction.largest_reward, np.abs(lived.reward).max(0))
        np.testing.assert_array_equal(state.interaction.largest_reward, so_far)
        for i, name in enumerate(after):
            np.testing.assert_allclose(state.levels.score[i], known[name][0], rtol=1e-3, atol=2e-4)
            np.testing.assert_allclose(state.levels.largest_return[i], known[name][1], rtol=1e-5)
            if replays:
                assert state.levels.last_seen[i] == (state.levels.time if name in names else before.levels.last_seen[i])

        # What is learned, and whether.
        if replays or not robust:
            batch = {
                "observation": lived.observation.astype(np.float64), "action": action, "log_density": log_density,
                "value": value, "advantage": advantage, "target": advantage + value,
            }  # fmt: skip
            parameters, found = clipped_by_hand.epochs(parameters, adam, batch, config, config.learning_rate, keys[6])
            for name in found[0].keys() & metrics.keys():
                assert metrics[name].count == len(found)
                actual = float(metrics[name].total / metrics[name].count)
                np.testing.assert_allclose(actual, np.mean([x[name] for x in found]), rtol=5e-3, atol=1e-4)
        else:
            assert metrics["loss"].count == 0
            jax.tree.map(np.testing.assert_array_equal, state.learner, before.learner)
        for name, expected in parameters.items():
            actual = clipped_by_hand.flat(state.learner.parameters)[name]
            np.testing.assert_allclose(actual, expected, rtol=3e-3, atol=3e-5, err_msg=name)
            parameters[name] = actual  # so that rounding does not add up
    assert 3 <= sum(kinds) <= 9
    assert min(completed) >= 2
    assert state.levels.size == 7


def test_without_replay_it_is_domain_randomisation():
    agent, _ = agent_of(robust=False, replay_probability=0.0)
    state, step = by_hand.quick(agent.init)(jax.random.key(0)), by_hand.quick(agent.step)
    for _ in range(6):
        state, metrics = step(state)
        assert metrics["replays"].total == 0
        assert metrics["loss"].count == 6


def test_nothing_is_replayed_before_there_are_enough_levels():
    """One place in ten filled would do, but an iteration plays three different ones."""
    agent, _ = agent_of(num_levels=10, minimum_fill=0.1, replay_probability=1.0)
    state, step = by_hand.quick(agent.init)(jax.random.key(0)), by_hand.quick(agent.step)
    for _ in range(4):
        size = int(state.levels.size)
        state, metrics = step(state)
        assert bool(metrics["replays"].total) == (size >= 3)


def test_exported_and_predicting(tmp_path):
    agent, _ = agent_of()
    state = by_hand.quick(agent.init)(jax.random.key(0))
    observation = jax.random.normal(jax.random.key(1), (50, 23))
    action = agent.policy.act(state, observation, (), jax.random.key(2))[0]
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)
    assert agent.claim.law(state, observation, action).atoms.shape == (50, 1)


def test_unsuitable_environments_and_sizes_are_refused():
    with pytest.raises(ValueError, match="whose levels cannot be drawn; this algorithm needs sample_level"):
        plr.make_agent(plr.Config(), by_hand.Choices(), by_hand.DriftParams())
    with pytest.raises(ValueError, match="--num-levels is 2; it must be at least --num-envs = 3"):
        agent_of(num_levels=2)


def test_defaults_are_those_of_jaxued():
    config = plr.Config()
    assert (config.num_envs, config.num_steps, config.num_epochs, config.num_minibatches) == (32, 256, 5, 1)
    assert (config.discount, config.gae_decay, config.entropy_weight, config.learning_rate) == (0.995, 0.98, 1e-3, 1e-4)
    assert (config.num_levels, config.replay_probability, config.minimum_fill) == (4000, 0.8, 0.5)
    assert (config.temperature, config.staleness, config.clip_range, config.gradient_bound) == (0.3, 0.3, 0.2, 0.5)
