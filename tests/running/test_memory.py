"""Memory: programs by hand, phases of real ones, causes named, limits read, refused before anything is made."""

import dataclasses
import io
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from toys import LearnerConfig, Toy, make_learner

from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.running import memory, session, training
from jaxrl_dist.running.problem import Problem, RunOptions

MIB = 2**20
BIG = jax.ShapeDtypeStruct((1000,), jnp.float32)  # 4,000 bytes


# ------------------------------------------------------------------------------------------------------- programs


def live(function, *arguments) -> int:
    return memory.live_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_results_count_and_arguments_do_not():
    assert live(lambda x: x, BIG) == 0
    assert live(lambda x: (jnp.cumsum(x), jnp.sort(x)), (BIG)) == 4000  # one of them in the place of the argument
    assert live(lambda x: (jnp.cumsum(x), jnp.sort(x), x), BIG) == 8000


def test_what_is_needed_no_more_makes_room():
    assert live(lambda x: jnp.cumsum(jnp.cumsum(x)).sum() + x[0], BIG) <= 4000 + 3 * 4


def test_elementwise_results_are_fused_unless_something_else_needs_them():
    pairs = lambda x: x[:, None] - x[None, :]  # noqa: E731 4 MB
    assert live(lambda x: jnp.abs(pairs(x)).sum(), BIG) < 10_000
    assert live(lambda x: (pairs(x) @ x).sum(), BIG) >= 4_000_000
    assert live(pairs, BIG) == 4_000_000


def test_functions_that_are_called_count_as_if_they_stood_there():
    pairs = jax.jit(lambda x: jnp.where(x[:, None] < x[None, :], 1.0, 2.0))
    assert live(lambda x: pairs(x).sum(), BIG) < 10_000


def test_a_loop_writes_into_its_carry():
    def fill(x):
        return jax.lax.fori_loop(0, 10, lambda i, x: x.at[i].set(jnp.sort(x[:10]).sum()), x)

    assert live(fill, BIG) < 400  # the argument's own memory, but for what one turn needs
    assert 4000 <= live(lambda: fill(jnp.zeros(1000))) < 4400
    assert 8000 <= live(lambda x: (fill(jnp.sort(x)), x), BIG) + 4000 < 8800


# ------------------------------------------------------------------------------------------------------ prediction


def make(num_seeds=4, width=1, eval_states=0, **changes) -> tuple[Problem, training.Programs]:
    config = LearnerConfig(width=width, replay_capacity=changes.pop("replay_capacity", 1024))
    options = RunOptions(total_steps=20_000, num_seeds=num_seeds, eval_states=eval_states, name="a", **changes)
    one = Problem("toy", make_learner, config, Toy(), Toy.default_params, options)
    return one, session.make_programs(one)


def test_fields_and_phases_are_those_of_the_state():
    _, programs = make()
    found = memory.predict(programs)
    state = jax.block_until_ready(programs.begin(jax.random.split(jax.random.key(0), 4)))
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    assert sum(found.fields.values()) == sum(sizes)
    rows = sum(x.nbytes for x in jax.tree.leaves(state.state.experience.replay))
    assert found.fields["state.experience.replay"] == rows == max(found.fields.values())
    assert found.phases["save"] >= sum(sizes)
    assert sum(sizes) <= found.phases["begin"] < 1.3 * sum(sizes)  # the replay is filled in place
    assert sum(sizes) <= found.phases["advance"] < 1.3 * sum(sizes)  # and written in place
    assert set(found.phases) == set(memory.PHASES) - {"pretrain", "calibrate"}
    assert found.needed == found.compiling + max(found.phases.values())


def refusal(monkeypatch, tmp_path, room: int, **changes) -> str:
    one, programs = make(runs_folder=str(tmp_path), **changes)
    monkeypatch.setattr(memory, "COMPILING_BYTES", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    with pytest.raises(ConfigurationError) as raised:
        session.train(one, Console(quiet=True), programs)
    assert list(tmp_path.iterdir()) == []  # before a folder is made, and nothing was compiled
    assert not programs.compiled
    assert "\n" not in str(raised.value)
    assert "--memory ignore" in str(raised.value)
    return str(raised.value)


def test_the_largest_consumer_is_named(monkeypatch, tmp_path):
    assert "(1,024 rows, --replay-capacity)" in refusal(monkeypatch, tmp_path, 100_000)
    many = refusal(monkeypatch, tmp_path, 10 * MIB, num_seeds=100_000)
    assert "each of the 100000 runs takes" in many
    assert "--num-seeds 100000" in many
    assert "the evaluation (--eval-episodes 1000000)" in refusal(monkeypatch, tmp_path, MIB, eval_episodes=1_000_000)


def of_an_algorithm(**changes) -> tuple[Problem, training.Programs]:
    """C51 on CartPole; `changes` of its configuration or of its options."""
    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.value_based import c51

    names = {field.name for field in dataclasses.fields(c51.Config)}
    config = dataclasses.replace(c51.Config(), **{name: x for name, x in changes.items() if name in names})
    others = {name: x for name, x in changes.items() if name not in names}
    options = RunOptions(env_id="CartPole-v1", total_steps=20_000, **{"eval_states": 0, **others})
    one = Problem("c51", c51.make_agent, config, *envs.make("CartPole-v1"), options)
    return one, session.make_programs(one)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eval_states": 4096, "eval_rollouts": 512}, "the calibration (--eval-states 4096 x --eval-rollouts 512)"),
        (
            {"batch_size": 2**20, "warmup_steps": 2**20, "replay_capacity": 2**20},
            "the batches of an update (--batch-size 1048576)",
        ),
    ],
)
def test_calibration_and_batches_are_named(monkeypatch, tmp_path, changes, named):
    one, programs = of_an_algorithm(**changes)
    monkeypatch.setattr(memory, "available_bytes", lambda: 64 * MIB)
    with pytest.raises(ConfigurationError, match=re.escape(named)):
        memory.require_room(one, programs, Console(quiet=True))
    assert not programs.compiled


def test_a_layer_of_two_thousand_million_units_is_refused_and_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(training.Programs, "compile", lambda _: pytest.fail("compiles"))
    one, _ = of_an_algorithm(hidden=(2**31 - 1,), runs_folder=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"most of it, .*, is .*fields like it \(--hidden 2147483647\)"):
        session.train(one, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_it_warns_between_comfortable_and_impossible_and_can_be_told_not_to(monkeypatch):
    one, programs = make()
    needed = memory.predict(programs).needed
    text = io.StringIO()
    console = Console(file=text, width=80)
    for room, said in ((2 * needed, False), (int(needed / memory.COMFORTABLE) + 1, False), (needed + 1, True)):
        monkeypatch.setattr(memory, "available_bytes", lambda room=room: room)
        memory.require_room(one, programs, console)
        assert bool(text.getvalue()) == said
    assert f"the runs need {needed / MIB:,.1f} MiB at their peak" in text.getvalue()
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(ConfigurationError, match="are available"):
        memory.require_room(one, programs, console)
    ignoring = one._replace(options=dataclasses.replace(one.options, memory="ignore"))
    memory.require_room(ignoring, programs, console)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.require_room(one, programs, console)


def test_checkpoints_that_the_disk_cannot_take_are_refused_at_the_start(monkeypatch, tmp_path):
    one, programs = make(runs_folder=str(tmp_path))
    size = sum(memory.predict(programs).fields.values())
    usage = lambda free: lambda _: type("Usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr(memory.shutil, "disk_usage", usage(3 * size))
    memory.require_disk(one, programs, tmp_path / "toy" / "new")
    monkeypatch.setattr(memory.shutil, "disk_usage", usage(3 * size - 1))
    with pytest.raises(ConfigurationError, match=r"--checkpoint-keep 2, and the next.*the disk has"):
        session.train(one, Console(quiet=True), programs)
    assert list(tmp_path.iterdir()) == []
    one = one._replace(options=dataclasses.replace(one.options, checkpoint_every=20_000))
    memory.require_disk(one, programs, tmp_path)  # there is but one checkpoint


# ------------------------------------------------------------------------------------------------ what is available


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An empty /proc and /sys/fs/cgroup; a function writes files there."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")

    def write(**files: str) -> int | None:
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return memory.available_bytes()

    return write


MEMINFO = "MemTotal:       24684096 kB\nMemFree:          466944 kB\nMemAvailable:   12582912 kB\n"


def test_available_is_not_free(machine):
    assert machine(proc__meminfo=MEMINFO) == 12 * 2**30


@pytest.mark.parametrize("path", ["/job", "/not/seen/from/inside"])
def test_limits_of_all_groups_above_count_and_files_can_be_let_go(machine, path):
    machine(proc__meminfo=MEMINFO, proc__self__cgroup=f"0::{path}\n")
    inner = f"cgroup{path if path == '/job' else ''}".replace("/", "__")
    stat = {"memoryDOTstat": f"anon 5\ninactive_file {300 * MIB}\n", "memoryDOTcurrent": f"{1000 * MIB}\n"}
    stat = {f"{inner}__{name}": content for name, content in stat.items()}
    assert machine(**stat, **{f"{inner}__memoryDOTmax": "max\n"}) == 12 * 2**30
    assert machine(**{f"{inner}__memoryDOTmax": f"{2048 * MIB}\n"}) == 1348 * MIB
    if path == "/job":
        above = {"memoryDOTstat": "inactive_file 0\n", "memoryDOTcurrent": "7\n", "memoryDOTmax": f"{100 * MIB + 7}"}
        assert machine(**{f"cgroup__{name}": content for name, content in above.items()}) == 100 * MIB


def test_the_first_version_of_control_groups(machine):
    files = {"memoryDOTlimit_in_bytes": f"{4096 * MIB}", "memoryDOTusage_in_bytes": f"{1024 * MIB}"}
    files["memoryDOTstat"] = f"inactive_file 1\ntotal_inactive_file {24 * MIB}\n"
    found = machine(
        proc__meminfo=MEMINFO, proc__self__cgroup="5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n",
        **{f"cgroup__memory__slurm__job_7__{name}": content for name, content in files.items()},
    )  # fmt: skip
    assert found == 3096 * MIB


# -------------------------------------------------------------------------------------------------- no second copy

SAVED = """
    import sys, jax, jax.numpy as jnp
    from pathlib import Path
    from jaxrl_dist.running import checkpointing

    def peak_of(action):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        result = jax.block_until_ready(action())
        return status("VmHWM") - before, result

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))

    mesh = jax.make_mesh((2,), ("runs",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    state = jax.jit(lambda: {{"replay": jnp.ones((2, 400_000, 50)), "key": jax.random.key(0)}},
                    out_shardings={{"replay": split, "key": None}})()  # 153 MiB
    checkpoints = checkpointing.Checkpoints({folder!r})
    checkpoints.save(0, jax.tree.map(lambda x: x[:1, :9] if x.ndim else x, state))  # what only the first one needs
    checkpointing.BLOCK_BYTES = 2**21
    saving, _ = peak_of(lambda: checkpoints.save(1, state))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    loading, loaded = peak_of(lambda: checkpoints.load(1, like))
    assert (loaded["replay"] == 1).all()
    print(saving, loading)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are reset through Linux's /proc")
def test_neither_saving_nor_loading_holds_the_state_twice(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    program = textwrap.dedent(SAVED.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saving, loading = map(int, done.stdout.split())
    assert saving < 40  # of 153 MiB; orbax held 3 quarters of them once more
    assert 140 < loading < 153 + 40


def test_a_policy_is_cut_out_without_the_replay():
    _, programs = make()
    state = programs.abstract_training.state
    left = training.without_replay(state)
    assert left.experience.replay is None
    assert left.weights is state.weights
