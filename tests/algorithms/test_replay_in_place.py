"""No work grows with the replay's capacity: the compiled training loop never copies a buffer."""

import re

import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.actor_critic import sac
from jaxrl_dist.running import training

CAPACITY = 12_344  # no other array has this size


@pytest.mark.proves("jaxrl_dist/running/training.py", "jaxrl_dist/learning", "constraints.txt")
@pytest.mark.parametrize(("num_envs", "runs", "mode"), [(1, 1, "map"), (8, 1, "map"), (1, 2, "vmap"), (1, 2, "map")])
def test_training_never_copies_the_replay(num_envs, runs, mode):
    """With one update per step the write and the reads stand in one loop body, where XLA once copied at every step."""
    env, env_params = envs.make("Pendulum-v1")
    config = sac.Config(
        num_envs=num_envs,
        warmup_steps=16,
        batch_size=8,
        replay_capacity=CAPACITY,
        actor_hidden=(8,),
        critic_hidden=(8,),
    )
    programs = training.Programs(sac.make_agent, config, env, env_params, num_runs=runs, runs_mode=mode)
    programs.compile()
    program = programs._advance.as_text()
    assert re.search(rf"\[(\d+,)*{CAPACITY}\b", program), "the buffer should be in the program"
    copies = re.findall(rf"\S+ = \w+\[{CAPACITY}[\d,]*\]\S* copy\(.*", program)
    # One run after another, each is copied out and back once per chunk, never per step; those are no `copy` of it.
    assert not copies, "\n".join(copies)
