"""Value-based agents fit every environment with a finite choice of actions: classic control, bsuite, MinAtar, ours."""

import jax
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import qr_dqn
from jaxrl_dist.configuration import ConfigurationError

CONFIG = qr_dqn.Config(
    num_envs=2, warmup_steps=8, replay_capacity=16, batch_size=4, hidden=(4,), num_quantiles=3, num_steps=2
)
# One of every kind: vectors, matrices, images of several depths, integer observations, no time limit of its own.
ENVIRONMENTS = (
    "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Breakout-MinAtar", "SpaceInvaders-MinAtar", "DeepSea-bsuite",
    "Catch-bsuite", "UmbrellaChain-bsuite", "FourRooms-misc", "bridge",
)  # fmt: skip


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_state_keeps_its_structure(env_id):
    env, params = envs.make(env_id)
    agent = qr_dqn.make_agent(CONFIG, env, params)
    start = jax.eval_shape(agent.init, jax.random.key(0))
    after, _ = jax.eval_shape(agent.step, start)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


def test_all_minatar_games_and_the_papers_environments_are_available():
    known = {env_id for ids in envs.available().values() for env_id in ids}
    games = {f"{game}-MinAtar" for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")}
    assert known >= games | set(ENVIRONMENTS)


def test_continuous_actions_are_refused():
    with pytest.raises(ConfigurationError, match="--env-id is Pendulum-v1, whose actions are continuous"):
        qr_dqn.make_agent(CONFIG, *envs.make("Pendulum-v1"))


def test_numbers_of_states_are_refused_unless_they_are_made_vectors():
    env, env_params = envs.make("FrozenLake-misc")  # made one-hot by `make`
    qr_dqn.make_agent(CONFIG, env, env_params)
    with pytest.raises(ConfigurationError, match=r"whose observations are discrete.*one_hot_observations makes them"):
        qr_dqn.make_agent(CONFIG, env.env, env_params)
