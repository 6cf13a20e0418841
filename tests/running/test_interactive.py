"""Training from Python: presets, going on, all devices, tables and files of states."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pandas as pd
import pytest
from toys import LearnerConfig, Toy, ToyParams, make_learner, run_with_devices

from jaxrl_dist import cli, envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning.interaction import Transition
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.records import plotting
from jaxrl_dist.running import catalog, interactive, training
from jaxrl_dist.running.checkpointing import DamagedCheckpoint


class Kind(NamedTuple):
    """An agent with its configuration, and where its two parts end."""

    make_agent: object
    config: object
    first: int
    total: int
    evaluations: tuple[int, int]
    data: tuple = ()


ROWS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
NEVER = np.zeros(64, bool)
KINDS = {
    "with a replay": Kind(make_learner, LearnerConfig(), 44, 80, (1, 1)),
    "with pretraining": Kind(kinds.make_on_policy, kinds.OnPolicyConfig(), 48, 120, (2, 2)),
    "offline": Kind(
        kinds.make_offline, kinds.OfflineConfig(), 20, 60, (1, 2),
        (Transition(ROWS, ROWS[:, :2], ROWS[:, 0], ROWS, NEVER, NEVER),),
    ),
}  # fmt: skip


def train_of(kind: Kind, total_steps: int, after_steps: int = 0, evaluations: int = 10):
    return training.make_train(
        kind.make_agent, kind.config, Toy(), ToyParams(), total_steps=total_steps, after_steps=after_steps,
        evaluations=evaluations, eval_episodes=2, eval_max_steps=9,
    )  # fmt: skip


def new_keys(count=2):
    return jax.random.split(jax.random.key(3), count)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = (jax.random.key_data(x) if is_key(x) else x for x in (a, b))
        np.testing.assert_array_equal(a, b)


REPLAY = KINDS["with a replay"]
CONFIGS = LearnerConfig(learning_rate=jnp.array([0.1, 0.1, 0.3]))


@pytest.fixture(scope="module")
def trained():
    """States and history of three runs by `vmap`, the first part of `REPLAY` with `CONFIGS`."""
    train = train_of(REPLAY, REPLAY.first, evaluations=2)
    rates = lambda key, rate: train(key, LearnerConfig(learning_rate=rate))  # noqa: E731
    return jax.jit(jax.vmap(rates))(new_keys(3), CONFIGS.learning_rate)


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_going_on_is_one_longer_run(name):
    """State and history, bit for bit; the parts' evaluations are where the longer run has its own."""
    kind = KINDS[name]
    before, after = kind.evaluations
    whole, first = (
        train_of(kind, kind.total, evaluations=before + after),
        train_of(kind, kind.first, evaluations=before),
    )
    rest = train_of(kind, kind.total, after_steps=kind.first, evaluations=after)
    shared = (None,) * (1 + len(kind.data))
    over_keys = jax.jit(jax.vmap(whole, in_axes=(0, *shared))), jax.jit(jax.vmap(first, in_axes=(0, *shared)))
    (states, history), (middle, early) = (run(new_keys(), kind.config, *kind.data) for run in over_keys)
    go_on = jax.vmap(lambda key, states, *given: rest(key, *given, states=states), in_axes=(0, 0, *shared))
    end, late = jax.jit(go_on)(new_keys(), middle, kind.config, *kind.data)
    assert_same(end, states)
    for column in history:
        np.testing.assert_array_equal(np.concatenate([early[column], late[column]], 1), history[column], err_msg=column)


def test_states_and_steps_go_together():
    kind = KINDS["with a replay"]
    state = jax.eval_shape(train_of(kind, 40), jax.random.key(0))[0]
    with pytest.raises(ConfigurationError, match="after_steps is 40, and states are not given; both go together"):
        jax.eval_shape(train_of(kind, 80, after_steps=40), jax.random.key(0))
    with pytest.raises(ConfigurationError, match="after_steps is 0, and states are given; both go together"):
        jax.eval_shape(lambda key, states: train_of(kind, 80)(key, states=states), jax.random.key(0), state)
    with pytest.raises(ConfigurationError, match="total_steps is 40; it must be above after_steps = 40"):
        jax.eval_shape(
            lambda key, states: train_of(kind, 40, after_steps=40)(key, states=states), jax.random.key(0), state
        )


# -- all devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_many_runs_are_those_that_vmap_trains(mode, trained):
    train_all = interactive.over_devices(train_of(REPLAY, REPLAY.first, evaluations=2), mode)
    assert_same(train_all(new_keys(3), CONFIGS), trained)


def test_data_is_shared():
    kind = KINDS["offline"]
    train = train_of(kind, 20, evaluations=1)
    states, _ = jax.jit(jax.vmap(train, in_axes=(0, None, None)))(new_keys(), kind.config, *kind.data)
    assert_same(interactive.over_devices(train)(new_keys(), kind.config, *kind.data)[0], states)
    with pytest.raises(ConfigurationError, match="configs is None; where there are data it must be given"):
        interactive.over_devices(train)(new_keys(), None, *kind.data)


def test_shapes_are_found_without_training():
    train_all = interactive.over_devices(train_of(REPLAY, 40, evaluations=2))
    states, history = jax.eval_shape(train_all, new_keys(3))
    assert states.weights.shape[0] == 3
    assert history["env_steps"].shape == (3, 2)


def on_two_devices():
    """Without configurations, and going on: from states on both devices, or all on one, as they come from a file."""
    assert jax.device_count() == 2
    first, rest = (
        interactive.over_devices(train_of(REPLAY, *steps, evaluations=1))
        for steps in ((REPLAY.first,), (80, REPLAY.first))
    )
    states, _ = first(new_keys(4))
    assert len(states.weights.sharding.device_set) == 2
    assert_same(states, jax.jit(jax.vmap(train_of(REPLAY, REPLAY.first, evaluations=1)))(new_keys(4))[0])
    end, _ = rest(new_keys(4), states=states)
    assert not np.array_equal(end.weights, states.weights)
    assert_same(rest(new_keys(4), states=jax.device_put(states, jax.devices()[0]))[0], end)
    assert len(jax.eval_shape(first, new_keys(3))[0].weights.shape) == 2  # on one: three cannot be shared


def test_runs_are_spread_over_the_devices():
    run_with_devices(2, "import test_interactive; test_interactive.on_two_devices()")


# -- presets ----------------------------------------------------------------------------------------------------------


def test_every_preset_is_a_configuration():
    for module in catalog.agents().values():
        for env_id, settings in module.PRESETS.items():
            config = interactive.preset(module, env_id)
            assert isinstance(config, module.Config)
            fields = settings.keys() & vars(config).keys()
            assert {name: getattr(config, name) for name in fields} == {name: settings[name] for name in fields}


def test_a_preset_with_changes():
    dqn = cli.find_algorithm("dqn")
    config = interactive.preset(dqn, "CartPole-v1", learning_rate=3e-4, hidden=(32,))
    assert (config.learning_rate, config.hidden, config.target_period) == (3e-4, (32,), 200)
    for changes, message in (
        ({"learning_rte": 1.0}, "learning_rte is no field of dqn's Config; did you mean learning_rate?"),
        ({"discount": 1.5}, "--discount is 1.5; it must be finite and in"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            interactive.preset(dqn, "CartPole-v1", **changes)
    with pytest.raises(
        ConfigurationError, match="env_id is 'Nowhere', for which dqn has no preset; there are CartPole"
    ):
        interactive.preset(dqn, "Nowhere")


def test_a_file_of_ones_own_has_presets_too():
    own = types.SimpleNamespace(
        __name__="my_agent", Config=LearnerConfig, PRESETS={"A": {"total_steps": 7, "width": 3}}
    )
    assert interactive.preset(own, "A") == LearnerConfig(width=3)


# -- tables -----------------------------------------------------------------------------------------------------------


def made_up(*shape):
    """A history whose numbers say where they stand."""
    index = np.arange(np.prod(shape)).reshape(shape)
    return {
        "env_steps": np.broadcast_to(100 * np.arange(1, shape[-1] + 1), shape), "loss": index / 2,
        "evaluation_return": np.stack([index - 1.0, index + 1.0], -1), "diverged_at": np.where(index == 0, -1, 64),
    }  # fmt: skip


def test_one_run_and_seeds():
    alone = interactive.history_table(made_up(3))
    assert alone.env_steps.tolist() == [100, 200, 300]
    assert "seed" not in alone
    table = interactive.history_table(made_up(2, 3))
    assert table.seed.tolist() == [0, 0, 0, 1, 1, 1]
    assert table.evaluation_return.tolist() == [0, 1, 2, 3, 4, 5]
    assert table.loss.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert table.diverged_at.isna().tolist() == [True] + [False] * 5


def test_axes_are_named():
    table = interactive.history_table(
        made_up(2, 3, 2), {"discount": [0.9, 0.99]}, {"seed": [7, 8, 9], "who": list("abc")}
    )
    assert table.discount.tolist() == [0.9] * 6 + [0.99] * 6
    assert table.seed.tolist() == [7, 7, 8, 8, 9, 9] * 2
    assert table.who.tolist() == list("aabbcc") * 2
    assert table[(table.discount == 0.99) & (table.seed == 8)].loss.tolist() == [4, 4.5]
    for axes in ((), ({"seed": range(2)},), ({"discount": [1, 2]}, {"seed": range(2)}), ({"a": [1, 2], "b": [1]},) * 2):
        with pytest.raises(ValueError, match=r"but the history's are \[2, 3\]: one mapping for each, of its length"):
            interactive.history_table(made_up(2, 3, 2), *axes)


def test_the_table_of_a_training_can_be_drawn(tmp_path, trained):
    table = interactive.history_table(trained[1])
    assert {"seed", "env_steps", "updates", "evaluation_return", "weight", "diverged_at"} <= {*table}
    plotting.learning_curve({"toy": table}, tmp_path / "curve.png", title="toy")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert isinstance(table, pd.DataFrame)


# -- files ------------------------------------------------------------------------------------------------------------


def test_states_are_written_and_read(tmp_path, trained):
    states, _ = trained
    interactive.save_states(tmp_path / "states", states)
    like = jax.eval_shape(jax.vmap(train_of(REPLAY, REPLAY.first)), new_keys(3))[0]
    assert_same(interactive.load_states(tmp_path / "states", like), states)
    assert_same(interactive.load_states(tmp_path / "states", states), states)


def test_what_cannot_be_written_or_read_is_said(tmp_path):
    states = {"weights": jnp.ones(3)}
    interactive.save_states(tmp_path / "states", states)
    with pytest.raises(ConfigurationError, match="which is there already; choose another one"):
        interactive.save_states(tmp_path / "states", states)
    with pytest.raises(ConfigurationError, match="which holds no states of `save_states`"):
        interactive.load_states(tmp_path / "nothing", states)
    with pytest.raises(ValueError, match="weights"):
        interactive.load_states(tmp_path / "states", {"weights": jnp.ones(4)})
    (tmp_path / "states" / "0" / "arrays" / "0" / "0").write_bytes(b"damaged")
    with pytest.raises(DamagedCheckpoint):
        interactive.load_states(tmp_path / "states", states)


def test_envs_are_those_of_the_command_line():
    """What the README shows: a preset on the environment it is for."""
    ppo = cli.find_algorithm("ppo")
    config = interactive.preset(ppo, "Catch-bsuite", num_steps=16)
    train = training.make_train(ppo.make_agent, config, *envs.make("Catch-bsuite"), total_steps=256)
    assert jax.eval_shape(train, jax.random.key(0))[1]["env_steps"].shape == (10,)
