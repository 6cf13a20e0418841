"""From an agent to a run: the only place with `jit`, `vmap` over runs, and sharding over devices.

A *run* is one element of the leading axis of every array here: one seed, with its own values of the configuration's
floats. `make_train` is the whole of training as one pure function; `Programs` is the same training cut into pieces,
between which the host records, checkpoints and stops.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_dist import switches
from jaxrl_dist.agent import Agent
from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.learning import replay
from jaxrl_dist.learning.devices import DATA
from jaxrl_dist.learning.interaction import Average, Interaction
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.learning.replay import Priorities, Replay
from jaxrl_dist.running import evaluation, hosts
from jaxrl_dist.running.progress import inside_program

RunsMode = Literal["auto", "vmap", "map"]

# From matrices of so many rows and columns on, a CPU is faster with one run after another per core than with runs
# batched: below, the cost of starting each kernel weighs more, above, that of batched matrix products.
WIDE = 256

# A run that breaks goes back to what it was at the last multiple of so many iterations. To look at every parameter and
# to keep a copy costs two passes over the learner, too much for every iteration and nothing for one in so many
# (measured in experiments/throughput/freezing.csv).
FREEZE_EVERY = 64
# Beside an agent's own metrics: its state itself, and what the host finds at an evaluation.
ALSO_WATCHED = ("state", "evaluation_return", "calibration_w1")
# What only ever records what happened is not part of what is put back: it is large, and nobody learns from it any more.
_RECORDS = (Replay, Priorities, Interaction)


class Training(NamedTuple):
    """A run in progress: all that a checkpoint has to hold.

    totals: `[2, metrics]`, sum and count of every metric since they were last taken, in the order of `metric_names`;
    nothing is added once the run is broken.
    broken_at: `[metrics + ALSO_WATCHED]` int32, the first iteration at which each was not finite, -1 if none.
    last_finite: the arrays of `state` but for replay and environments at the last multiple of `FREEZE_EVERY` at which
    all was finite, to which a broken run is put back; () where broken runs are not frozen.
    """

    state: Any
    totals: jax.Array
    broken_at: jax.Array
    last_finite: tuple[jax.Array, ...]
    iteration: jax.Array


def metric_names(agent: Agent, state: Any) -> tuple[str, ...]:
    """Names of the metrics of `agent.step` and `agent.pretrain`, in the order in which `Training` keeps them."""
    phases = [phase for phase in (agent.step, agent.pretrain) if phase]
    return tuple(sorted({name for phase in phases for name in jax.eval_shape(phase, state)[1]}))


def watched_names(metric_names: Sequence[str]) -> tuple[str, ...]:
    """What each column of `Training.broken_at` watches."""
    return (*metric_names, *ALSO_WATCHED)


def begin(agent: Agent, key: jax.Array, freeze: bool = True) -> Training:
    """A run that has filled its replay and done no iteration yet; `freeze`: whether it is frozen when it breaks."""
    return resumed(agent, agent.init(key), 0, freeze)


def resumed(agent: Agent, state: Any, iteration: int, freeze: bool = True) -> Training:
    """A run whose agent has this state after so many iterations, taken for sound; no metrics are counted yet."""
    names = metric_names(agent, state)
    return Training(
        state, jnp.zeros((2, len(names))), jnp.full(len(watched_names(names)), -1, jnp.int32),
        tuple(_learned(state)) if freeze else (), jnp.int32(iteration),
    )  # fmt: skip


def advance(
    agent: Agent, training: Training, first: int | jax.Array, iterations: int | jax.Array, phase: Callable | None = None
) -> Training:
    """Do `iterations` iterations; their number may be traced, so one program serves chunks of every length.

    phase: `agent.step`, which is the default, or `agent.pretrain`; all iterations of a call are of one phase.

    `first` is the iteration at which `training` stands, given apart because it is the same for all runs, and a loop
    whose length differs between runs is a slow one. A run in which a metric or the state becomes NaN or infinite is
    frozen: at the next multiple of `FREEZE_EVERY`, or at the end of this call, it is put back to `last_finite`, and so
    ever after. Wherever a training is cut into calls, its runs end in the same place.
    """

    phase = phase or agent.step
    names = metric_names(agent, training.state) if agent.pretrain else ()  # else those of `step`, traced once
    nothing = Average(jnp.float32(0), jnp.float32(0))

    def once(_, training: Training) -> Training:
        state, metrics = phase(training.state)
        iteration = training.iteration + 1
        # One array for all metrics: on CPU every scalar kept apart costs a kernel of its own at every iteration.
        in_order = [metrics.get(name, nothing) for name in names or sorted(metrics)]
        values = jnp.stack(jax.tree.leaves(in_order)).reshape(-1, 2).T
        finite = jnp.concatenate([jnp.isfinite(values[0]), jnp.ones(len(ALSO_WATCHED), bool)])
        broken_at = jnp.where((training.broken_at < 0) & ~finite, iteration, training.broken_at)
        totals = training.totals + jnp.where((broken_at < 0).all(), values, 0)
        return training._replace(state=state, totals=totals, broken_at=broken_at, iteration=iteration)

    def block(carry):
        now, training = carry
        length = jnp.minimum(FREEZE_EVERY - now % FREEZE_EVERY, end - now)
        training = jax.lax.fori_loop(0, length, once, training)
        return now + length, _put_back_where_broken(training, (now + length) % FREEZE_EVERY == 0)

    first, end = jnp.int32(first), jnp.int32(first) + iterations
    if not training.last_finite:
        return jax.lax.fori_loop(0, iterations, once, training)
    return jax.lax.while_loop(lambda carry: carry[0] < end, block, (first, training))[1]


def _put_back_where_broken(training: Training, keep: jax.Array) -> Training:
    """`last_finite` in place of a broken state, and where `keep` is true a new `last_finite` of one that is sound."""
    learned = _learned(training.state)
    floats = [x for x in learned if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.array([True, *(jnp.isfinite(x).all() for x in floats)]).all()
    place = training.broken_at.shape[0] - len(ALSO_WATCHED) + ALSO_WATCHED.index("state")
    sound = (training.broken_at < 0).all()
    # That of the block's end, wherever in the block this is: a call may end anywhere, and its length is the machine's.
    iteration = -(-training.iteration // FREEZE_EVERY) * FREEZE_EVERY
    broken_at = training.broken_at.at[place].set(jnp.where(sound & ~finite, iteration, training.broken_at[place]))
    sound &= finite
    learned = [jnp.where(sound, now, before) for now, before in zip(learned, training.last_finite, strict=True)]
    kept = tuple(jnp.where(keep, now, before) for now, before in zip(learned, training.last_finite, strict=True))
    return training._replace(state=_with_learned(training.state, learned), broken_at=broken_at, last_finite=kept)


def _is_record(node: Any) -> bool:
    return isinstance(node, _RECORDS)


def _is_learned(node: Any) -> bool:
    return not (_is_record(node) or is_key(node))


def _learned(state: Any) -> list[jax.Array]:
    """The arrays of a state without those of its replay and environments, and without keys."""
    return [node for node in jax.tree.leaves(state, is_leaf=_is_record) if _is_learned(node)]


def _with_learned(state: Any, learned: Sequence[jax.Array]) -> Any:
    """The state with other arrays in the places of `_learned`."""
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_record)
    rest = iter(learned)
    return jax.tree.unflatten(structure, [next(rest) if _is_learned(node) else node for node in nodes])


def better_of(kept: tuple[jax.Array, ...], state: Any, better: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays by which a policy acts, all but replay and environments: those of `state` where it is `better`, else
    those `kept` before; `with_policy` puts them back."""
    return tuple(jnp.where(better, now, before) for now, before in zip(_learned(state), kept, strict=True))


def with_policy(training: Training, kept: Sequence[jax.Array]) -> Training:
    """The training with the arrays of `better_of` in its state, to evaluate or export them."""
    return training._replace(state=_with_learned(training.state, kept))


def largest_reward(state: Any) -> jax.Array:
    """The largest |reward| that the environments in an agent's state have given; NaN where it has none."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Interaction))
    found = [node.largest_reward.max() for node in nodes if isinstance(node, Interaction)]
    return jnp.stack(found).max() if found else jnp.float32(jnp.nan)


def take_metrics(training: Training) -> tuple[Training, jax.Array]:
    """Averages `[metrics]` since the last call (NaN where nothing was counted, such as no finished episode)."""
    total, count = training.totals
    averages = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
    return training._replace(totals=jnp.zeros_like(training.totals)), averages


# -- the whole of training as one pure function -----------------------------------------------------------------------


def make_train(
    make_agent: Callable,
    config: Any,
    env: Any,
    env_params: Any,
    *,
    total_steps: int,
    after_steps: int = 0,
    evaluations: int = 10,
    eval_episodes: int = 10,
    eval_max_steps: int = 0,
    progress: bool = False,
) -> Callable:
    """The pure function `train(key, config, *data, states=None) -> (state, history)`, environments and evaluation
    inside of it.

    `jax.jit(jax.vmap(train))(keys)` trains one run per key; `jax.vmap` over the floats of `config` sweeps them. Of an
    algorithm that learns from given arrays, `data` is an argument of `train`, the same for all runs (`in_axes=None`).
    `history` holds `env_steps` and `updates` `[evaluations]`, `evaluation_return` `[evaluations, episodes]` and of a
    vector of rewards or a cost `evaluation_rewards` and `evaluation_cost` `[evaluations, episodes, ...]`, the
    averages of all training metrics `[evaluations]`, NaN where nothing was counted, and `diverged_at` `[evaluations]`,
    the iteration at which a metric or the learner became NaN or infinite, -1 if none: from then on the run is frozen at
    its last finite learner, others go on. All of it is 32-bit, under JAX_ENABLE_X64 as well. progress: print a line at
    every evaluation, one for all runs. `train` raises ConfigurationError under switches of JAX that it cannot bear
    (`switches.check`; jax_debug_nans).

    after_steps: go on from `states`, the state that a `train` with these `total_steps` and the same key has returned;
    what comes is what one longer run would have had from there on, bit for bit on a CPU. `history` is that of the rest.
    A run that had diverged goes on from its last finite learner, and is not known as broken any more.
    """
    default_config = config
    tell = inside_program(total_steps) if progress else lambda now, returns, unit: now
    max_steps = evaluation.episode_limit(env_params, eval_max_steps)

    @switches.in_32_bits
    def train(
        key: jax.Array, config: Any = default_config, *data: Any, states: Any = None
    ) -> tuple[Any, dict[str, jax.Array]]:
        switches.check()
        if jax.config.jax_debug_nans:
            raise ConfigurationError(
                "JAX_DEBUG_NANS is on, but the history marks with NaN what was not counted; turn it off, or train from "
                "the command line, which says in which iteration a metric became NaN"
            )
        agent = make_agent(config, env, env_params, *data)
        clock, total_iterations = agent.clock, agent.clock.iterations(total_steps)
        first = clock.iterations(after_steps) if after_steps else 0
        require(
            (states is None) == (after_steps == 0),
            f"after_steps is {after_steps}, and states are {'not ' * (states is None)}given; both go together",
        )
        require(first < total_iterations, f"total_steps is {total_steps}; it must be above after_steps = {after_steps}")
        # Evaluations at even distances; the last one after the last iteration.
        boundaries = np.round(np.linspace(first, total_iterations, evaluations + 1)).astype(np.int32)
        training_key, evaluation_key = run_keys(key)

        def leg(training, boundary):
            if agent.pretrain:
                until = jnp.minimum(boundary, clock.pretraining)
                pretraining = jnp.maximum(until - training.iteration, 0)
                training = advance(agent, training, training.iteration, pretraining, agent.pretrain)
            training = advance(agent, training, training.iteration, boundary - training.iteration)
            training, averages = take_metrics(training)
            metrics = dict(zip(metric_names(agent, training.state), averages, strict=True))
            eval_key = jax.random.fold_in(evaluation_key, boundary)
            episodes = evaluation.evaluate(
                agent, env, env_params, training.state, eval_key, episodes=eval_episodes, max_steps=max_steps
            )
            now = tell(jnp.asarray(clock.now(training.iteration), jnp.int32), episodes.episode_return, clock.unit)
            never = jnp.iinfo(jnp.int32).max
            first_broken = jnp.where(training.broken_at < 0, never, training.broken_at).min()
            return training, metrics | {
                "env_steps": now if clock.unit == "env steps" else jnp.full_like(now, clock.warmup_steps),
                "updates": clock.updates_at(training.iteration),
                "evaluation_return": episodes.episode_return,
                **{f"evaluation_{name}": sums for name, sums in (episodes.extras or {}).items()},
                "diverged_at": jnp.where(first_broken == never, -1, first_broken),
            }  # fmt: skip

        start = begin(agent, training_key) if states is None else resumed(agent, states, first)
        training, history = jax.lax.scan(leg, start, boundaries[1:])
        return training.state, history

    return train


def seed_keys(seeds: np.ndarray) -> jax.Array:
    """The keys of seeds `[runs]` below 2^32, each that of `jax.random.key(seed)`."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def run_keys(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of a run's training and of its evaluations, kept apart so that evaluating never changes training."""
    training_key, evaluation_key = jax.random.split(key)
    return training_key, evaluation_key


# -- the same training in pieces, over runs and devices ---------------------------------------------------------------


class Programs:
    """Compiled pieces of training over the `runs` axis: `begin`, `pretrain`, `advance`, `take_metrics`, `evaluate`,
    `calibrate`.

    Runs are spread over as many devices as divide their number, or, with `data_parallel`, all devices work on every
    run, each on its part of the environments and batches. On one device they are vmapped (accelerators, and
    narrow networks on CPU) or done one after another (wide networks on CPU, where a batched matrix product is slower
    than several plain ones; results are then those of the run alone, bit for bit).

    Of several processes (`hosts`) all must call the same methods, and each holds its part of every array: `runs_here`
    says which runs those are, `hosts.gather` gets small arrays in full.
    """

    def __init__(
        self,
        make_agent: Callable,
        configs: Any,
        env: Any,
        env_params: Any,
        *data: Any,
        num_runs: int,
        max_devices: int | None = None,
        runs_mode: RunsMode = "auto",
        data_parallel: bool = False,
        freeze: bool = True,
        eval_episodes: int = 10,
        eval_max_steps: int = 0,
        eval_states: int = 0,
        eval_rollouts: int = 32,
        keep_best: bool = False,
    ):
        """`configs` is a configuration whose floats are scalars shared by all runs, or arrays `[runs]`.

        data: what all runs learn from, for algorithms that are given arrays; it is held once by every device. freeze:
        runs that break are frozen (`advance`), the others go on. keep_best: there is a program `keep_better`, and what
        it keeps counts as part of what is held and saved.
        """
        switches.settle()
        self.num_runs = num_runs
        devices = _devices(num_runs, max_devices, data_parallel)
        self.num_devices = len(devices)
        mesh = jax.make_mesh((len(devices),), (DATA if data_parallel else "runs",), (AxisType.Auto,), devices=devices)
        # Where an array with the axis `runs` lies: split by runs, or whole on every device.
        self.sharding = NamedSharding(mesh, PartitionSpec() if data_parallel else PartitionSpec("runs"))
        self.configs = self._spread(configs)
        self.data = hosts.place(data, NamedSharding(mesh, PartitionSpec()))
        self.compiled = False
        # The first run's agent, for sizes and names: with the floats of all runs its shapes would not fit.
        self.agent = make_agent(jax.tree.map(lambda x: np.ravel(x)[0], configs), env, env_params, *self.data)
        state = jax.eval_shape(self.agent.init, jax.random.key(0))
        self.metric_names = metric_names(self.agent, state)
        self.runs_mode = runs_mode if runs_mode != "auto" else self.agent.runs_mode or fastest_mode(state)
        max_steps = evaluation.episode_limit(env_params, eval_max_steps)

        def agent_of(config, data):
            return make_agent(config, env, env_params, *data)

        def _begin(config, key, *data):
            return begin(agent_of(config, data), key, freeze)

        def _advance(training, config, iterations, *data_and_first):
            *data, first = data_and_first
            return advance(agent_of(config, data), training, first, iterations)

        def _pretrain(training, config, iterations, *data_and_first):
            *data, first = data_and_first
            agent = agent_of(config, data)
            return advance(agent, training, first, iterations, agent.pretrain)

        def _evaluate(training, config, key, *data):
            return evaluation.evaluate(
                agent_of(config, data), env, env_params, training.state, key, episodes=eval_episodes,
                max_steps=max_steps,
            )  # fmt: skip

        # Learned return distributions can be compared with Monte-Carlo ones where the time limit can be lifted.
        wanted = self.agent.claim and eval_states > 0
        endless = evaluation.without_time_limit(env, env_params) if wanted else None
        self.calibrates = endless is not None

        def _calibrate(training, config, key, *data):
            claim = agent_of(config, data).claim
            found = evaluation.return_distributions(
                claim, env, endless, training.state, key, states=eval_states, rollouts=eval_rollouts,
                horizon=evaluation.horizon(claim.discount), spread=evaluation.spread(max_steps, eval_states),
            )  # fmt: skip
            return evaluation.calibration(found, learns_mean=claim.learns_mean)

        def program(
            function,
            arguments: int,
            shared: int = 0,
            donate: bool = False,
            out: Any = self.sharding,
            more=lambda *_: (),
        ):
            """`more`: further shared arguments of `function`, made out of the others. Data is the last of `shared`."""
            shared += len(self.data)

            def all_runs(*given):
                every = (*given, *more(*given))
                return over_runs(function, self.runs_mode, shared + len(every) - len(given), donate, *every)

            if data_parallel:

                def split_over_devices(*arguments):
                    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                        return all_runs(*arguments)

                return jax.jit(split_over_devices, donate_argnums=0 if donate else (), out_shardings=out)
            specs = (PartitionSpec("runs"),) * arguments + (PartitionSpec(),) * shared
            sharded = jax.shard_map(
                all_runs, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("runs"), check_vma=False
            )
            return jax.jit(sharded, donate_argnums=0 if donate else ())

        self._training_sharding = self.sharding
        if data_parallel:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_runs))
            self._training_sharding = _rows_split(program(_begin, 2).eval_shape(self.configs, keys, *self.data), mesh)
        self._begin = program(_begin, 2, out=self._training_sharding)
        self._advance, self._pretrain = (
            program(
                function, 2, shared=1, donate=True, out=self._training_sharding,
                more=lambda runs, *_: (runs.iteration[0],),
            )
            for function in (_advance, _pretrain)
        )  # fmt: skip
        self._evaluate = program(_evaluate, 3)
        self._calibrate = program(_calibrate, 3)
        self._take_metrics = jax.jit(
            jax.vmap(take_metrics), donate_argnums=0, out_shardings=(self._training_sharding, self.sharding)
        )
        self._largest_reward = jax.jit(jax.vmap(largest_reward), out_shardings=self.sharding)
        self.keeps_best = keep_best
        if keep_best:
            self._keep_better = jax.jit(jax.vmap(better_of), donate_argnums=0, out_shardings=self.sharding)

    @functools.cached_property
    def abstract_training(self) -> Training:
        """Shapes, dtypes and shardings of the training of all runs, without computing anything."""
        keys = self._keys(jax.random.split(jax.random.key(0), self.num_runs))
        shapes = self._begin.eval_shape(self.configs, keys, *self.data)
        shardings = jax.tree.broadcast(self._training_sharding, shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    @functools.cached_property
    def abstract_best(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes, dtypes and shardings of what `keep_better` keeps; () where it keeps nothing."""
        learned = _learned(self.abstract_training.state) if self.keeps_best else ()
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding) for x in learned)

    @property
    def abstract_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint of a run holds, in shapes: the training, its seconds, and the best policies if kept."""
        best = {"best": self.abstract_best} if self.keeps_best else {}
        seconds = jax.ShapeDtypeStruct((), np.float64)
        return {"training": self.abstract_training, "seconds": seconds} | best

    @functools.cached_property
    def traces(self) -> dict[str, jax.stages.Traced]:
        """All pieces as JAX traced them, by name: what is compiled, and from which `memory` predicts its needs."""
        training, keys = self.abstract_training, self._keys(jax.random.split(jax.random.key(0), self.num_runs))
        traces = {
            "begin": self._begin.trace(self.configs, keys, *self.data),
            "advance": self._advance.trace(training, self.configs, np.int32(0), *self.data),
            "evaluate": self._evaluate.trace(training, self.configs, keys, *self.data),
            "take_metrics": self._take_metrics.trace(training),
            "largest_reward": self._largest_reward.trace(training.state),
        }
        if self.calibrates:
            traces["calibrate"] = self._calibrate.trace(training, self.configs, keys, *self.data)
        if self.agent.pretrain:
            traces["pretrain"] = self._pretrain.trace(training, self.configs, np.int32(0), *self.data)
        if self.keeps_best:
            better = hosts.place(np.zeros(self.num_runs, bool), self.sharding)
            traces["keep_better"] = self._keep_better.trace(self.abstract_best, training.state, better)
        return traces

    def _spread(self, configs: Any) -> Any:
        floats = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x, np.float32), self.num_runs), configs)
        return hosts.place(floats, self.sharding)

    def set_floats(self, configs: Any) -> None:
        """Take other floats; what is compiled stays compiled. `agent` remains that of the first ones."""
        self.configs = self._spread(configs)

    def compile(self) -> None:
        """Compile all pieces ahead of time, so that compile seconds are known and nothing compiles later."""
        if self.compiled:
            return
        self.compiled = True
        for name, traced in self.traces.items():
            setattr(self, f"_{name}", traced.lower().compile())

    def memory_of_advance(self) -> int:
        """Bytes that the compiled training program holds at once: arguments (all state) and temporaries."""
        analysis = self._advance.memory_analysis()
        return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes

    def _keys(self, keys: jax.Array) -> jax.Array:
        return hosts.place(keys, self.sharding)

    def begin(self, keys: jax.Array) -> Training:
        """Start all runs: `keys` `[runs]`."""
        return self._begin(self.configs, self._keys(keys), *self.data)

    def pretrain(self, training: Training, iterations: int) -> Training:
        """Do `iterations` of the first `clock.pretraining` iterations of every run; the given training is consumed."""
        return self._pretrain(training, self.configs, np.int32(iterations), *self.data)

    def advance(self, training: Training, iterations: int) -> Training:
        """Do `iterations` iterations of every run, none of them of `pretrain`; the given training is consumed (its
        buffers are donated)."""
        return self._advance(training, self.configs, np.int32(iterations), *self.data)

    def take_metrics(self, training: Training) -> tuple[Training, jax.Array]:
        """Averages `[runs, metrics]` since the last call; the given training is consumed."""
        with jax.debug_nans(False):  # blanks are NaN on purpose
            return self._take_metrics(training)

    def largest_reward(self, training: Training) -> jax.Array:
        """The largest |reward| that each run has seen, `[runs]`; NaN where its environments are not in its state."""
        return self._largest_reward(training.state)

    def nothing_kept(self) -> tuple[jax.Array, ...]:
        """What there is for `keep_better` to replace before anything was kept: zeros."""
        return tuple(hosts.place(np.zeros(x.shape, x.dtype), x.sharding) for x in self.abstract_best)

    def keep_better(self, kept: tuple[jax.Array, ...], training: Training, better: np.ndarray) -> tuple[jax.Array, ...]:
        """`kept` (consumed), with the policies of the runs that are `better` `[runs]` in place of their old ones."""
        return self._keep_better(kept, training.state, hosts.place(better, self.sharding))

    def mark(self, training: Training, broken_at: np.ndarray) -> Training:
        """The training with other `broken_at` `[runs, watched]`: what the host found broken is frozen from now on."""
        return training._replace(broken_at=hosts.place(broken_at.astype(np.int32), training.broken_at.sharding))

    def evaluate(self, training: Training, keys: jax.Array) -> evaluation.Episodes:
        """Evaluate every run: leaves `[runs, episodes]`."""
        return self._evaluate(training, self.configs, self._keys(keys), *self.data)

    def calibrate(self, training: Training, keys: jax.Array) -> evaluation.Calibration:
        """Learned return distributions of every run against Monte-Carlo ones: leaves `[runs]`."""
        return self._calibrate(training, self.configs, self._keys(keys), *self.data)


def one_run(tree: Any, run: int) -> Any:
    """One run's part of a tree whose arrays have the axis `runs` first, on the device that holds it.

    Plain indexing of an array that is sharded over devices is a collective operation; dozens of them in flight at once
    can wait for each other for ever on CPU devices, until XLA aborts the process. Of a data-parallel run this is what
    its first device here holds: the learner as a whole, and its own part of the environments.
    """

    def take(x: jax.Array) -> jax.Array:
        for shard in x.addressable_shards:
            first, last, _ = shard.index[0].indices(x.shape[0])
            if first <= run < last:
                return shard.data[run - first]
        raise IndexError(f"run is {run}; this process holds no such run of {x.shape[0]}")

    return jax.tree.map(take, tree)


def without_replay(state: Any) -> Any:
    """An agent's state with None in the place of its replay, which is large, and no policy acts by it."""

    def is_large(node: Any) -> bool:
        return isinstance(node, Replay | Priorities)

    return jax.tree.map(lambda node: None if is_large(node) else node, state, is_leaf=is_large)


def _rows_split(training: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of a data-parallel training `[runs, ...]`: environments split by rows, the rest on every device.

    The replay is on every device too: a batch is drawn from all of it, and what environments see is little beside it.
    """

    def of_node(node: Any) -> Any:
        rows = PartitionSpec(None, DATA) if isinstance(node, Interaction) else PartitionSpec()
        return jax.tree.map(lambda _: NamedSharding(mesh, rows), node)

    return jax.tree.map(of_node, training, is_leaf=lambda node: isinstance(node, Interaction))


def runs_here(tree: Any) -> list[int]:
    """The runs, by number, that this process is to keep, of a tree whose arrays have the axis `runs` first: those that
    its devices hold, and of a run that several processes hold none but those of the first copy."""
    whole = jax.tree.leaves(tree)[0]
    held = (range(whole.shape[0])[s.index[0]] for s in whole.addressable_shards if s.replica_id == 0)
    return sorted(run for runs in held for run in runs)


def _devices(num_runs: int, max_devices: int | None, data_parallel: bool) -> list[jax.Device]:
    """As many devices as divide the runs evenly, equally many of every process; for a data-parallel run all of them."""
    processes = jax.process_count()
    of_each = [[device for device in jax.devices() if device.process_index == i] for i in range(processes)]
    count = (max_devices or jax.device_count()) // processes
    if not data_parallel:
        most = min(count, num_runs // processes)
        count = max(n for n in range(1, most + 1) if num_runs % (n * processes) == 0)
    return [device for devices in of_each for device in devices[:count]]


def take_runs(tree: Any, runs: np.ndarray) -> Any:
    """Some runs of a tree whose arrays have the axis `runs` first, on the host; typed keys as their raw data."""
    return jax.tree.map(lambda x: np.asarray(x)[runs], _plain(tree))


def join_runs(parts: Sequence[Any], like: Any, shardings: Any) -> Any:
    """The runs of all `parts` (`take_runs`) in turn, spread over devices; `like` says which of the arrays are keys."""
    return jax.device_put(_keyed(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), like), shardings)


def grow_replay(runs: Training, like: Training) -> Training:
    """Runs `[runs, ...]` with the room in their replay that `like` has, and its shardings; one that has wrapped is as
    large as it was asked to be, and stays as it is."""

    def grown(node, wanted):
        if jax.tree.map(jnp.shape, node) == jax.tree.map(jnp.shape, wanted):
            return node
        if isinstance(node, Replay):
            capacity = jax.tree.leaves(wanted.rows)[0].shape[1]
            return jax.vmap(lambda one: replay.grow(one, capacity))(node)
        if isinstance(node, Priorities):
            return jax.vmap(lambda one: replay.grow_priorities(one, wanted.tree.shape[1]))(node)
        return node

    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(lambda runs: jax.tree.map(grown, runs, like, is_leaf=_is_record), out_shardings=shardings)(runs)


def fastest_mode(state: Any) -> RunsMode:
    """`map` for wide networks on CPU, else `vmap` (measured in experiments/throughput); `state`: one run's shapes."""
    matrices = [x.shape for x in _learned(state) if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)]
    wide = max((min(shape[-2:]) for shape in matrices), default=0) >= WIDE
    return "map" if wide and jax.default_backend() == "cpu" else "vmap"


def over_runs(function, mode: RunsMode, shared: int, in_place: bool, *arguments):
    """Apply `function` to every run of this device; the last `shared` arguments are the same for all."""
    split = len(arguments) - shared
    batched, common = arguments[:split], arguments[split:]
    num_runs = jax.tree.leaves(batched)[0].shape[0]
    if num_runs == 1:
        outputs = function(*jax.tree.map(lambda x: x[0], batched), *common)
        return jax.tree.map(lambda x: x[None], outputs)
    if mode == "vmap":
        return jax.vmap(function, in_axes=(0,) * split + (None,) * shared)(*arguments)
    # Keys travel through the loops below as plain numbers: JAX's reuse checker takes reading one key of an array at
    # every turn for reading the same key again.
    batched = _plain(batched)
    if not in_place:
        return jax.lax.map(lambda one: function(*_keyed(one, arguments), *common), batched)

    # The first argument is updated run by run inside one carried buffer: `lax.map` would hold every replay twice.
    def one_run(index, first):
        one = jax.tree.map(lambda x: x[index], (first, *batched[1:]))
        updated = _plain(function(*_keyed(one, arguments), *common))
        return jax.tree.map(lambda whole, new: whole.at[index].set(new), first, updated)

    return _keyed(jax.lax.fori_loop(0, num_runs, one_run, batched[0]), arguments[0])


def _plain(tree):
    """The tree with typed keys as their raw data."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _keyed(tree, like):
    """The tree with raw data wrapped as keys wherever `like` has typed keys."""
    flat = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=False)
    leaves = [jax.random.wrap_key_data(x, impl=jax.random.key_impl(key)) if is_key(key) else x for x, key in flat]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
