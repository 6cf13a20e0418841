"""How things are said: numbers of things, nearest names, and what algorithms are called."""

import pytest

from jaxrl_dist.running.catalog import algorithms, display_name
from jaxrl_dist.wording import alternatives, counted, nearest

OPTIONS = (
    "env_id", "env_options", "num_envs", "num_seeds", "seed", "total_steps", "batch_size", "discount", "polyak",
    "actor_learning_rate", "critic_learning_rate", "critic_hidden", "replay_capacity", "warmup_steps", "runs_folder",
)  # fmt: skip


def test_counts_have_their_grammar():
    assert [counted(n, "seed") for n in (0, 1, 2, 1000)] == ["0 seeds", "1 seed", "2 seeds", "1,000 seeds"]
    assert [alternatives("abc"[:n]) for n in (1, 2, 3)] == ["a", "a or b", "a, b or c"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", ["actor_learning_rate", "critic_learning_rate"]),  # initials
        ("critic_lr", ["critic_learning_rate"]),
        ("bs", ["batch_size"]),
        ("n-envs", ["num_envs"]),  # beginnings of words
        ("env", ["env_id", "env_options"]),
        ("batch", ["batch_size"]),
        ("gamma", ["discount"]),  # other words for the same
        ("tau", ["polyak"]),
        ("buffer_size", ["replay_capacity"]),
        ("learning_starts", ["warmup_steps"]),
        ("total_timesteps", ["total_steps"]),  # likeness
        ("sead", ["seed"]),
        ("runs-foldr", ["runs_folder"]),
    ],
)
def test_the_nearest_names_come_first(typed, meant):
    assert nearest(typed, OPTIONS)[: len(meant)] == meant


def test_nothing_is_near_to_a_word_of_its_own():
    assert nearest("xyzzy", OPTIONS) == []
    assert nearest("alpha", ("discount",)) == [], "a synonym of an option that is not there"


def test_what_algorithms_are_called():
    """By what their docstrings begin with; of an algorithm that is not ours, by its file's name."""
    called = {
        name: display_name(name) for name in ("qr_dqn", "eta_dqn", "dsac_t", "os_c51", "rainbow", "tqc", "my_own")
    }
    assert list(called.values()) == ["QR-DQN", "D-eta-N", "DSAC-T", "OS-C51", "Rainbow", "TQC", "MY-OWN"]
    assert all(display_name(name) for name in algorithms())
