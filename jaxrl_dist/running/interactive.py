"""What one wants beside `training.make_train` in a notebook: presets, all devices, tables, and files of states."""

import dataclasses
import functools
import html
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_dist.configuration import check_configuration, require
from jaxrl_dist.running import problem, training
from jaxrl_dist.running.checkpointing import Checkpoints
from jaxrl_dist.wording import alternatives, nearest


def preset(algorithm: ModuleType, env_id: str, **changes: Any) -> Any:
    """The `Config` of an algorithm's preset for an environment, with other values where `changes` say so.

    What a preset says of the run, such as its `total_steps`, belongs to `make_train` and is left out. Raises
    ConfigurationError for an environment without a preset, a field that there is not, and a value out of its range.
    """
    name = algorithm.__name__.rpartition(".")[2]
    require(
        env_id in algorithm.PRESETS,
        f"env_id is {env_id!r}, for which {name} has no preset; there are {', '.join(algorithm.PRESETS)}, and "
        "`Config()` for all else",
    )
    fields = [field.name for field in dataclasses.fields(algorithm.Config)]
    for change in changes:
        hint = f"did you mean {alternatives(near)}?" if (near := nearest(change, fields)) else f"it has {fields}"
        require(change in fields, f"{change} is no field of {name}'s Config; {hint}")
    config = algorithm.Config(**problem.split_preset(algorithm.PRESETS[env_id])[1] | changes)
    check_configuration(config)
    return config


def over_devices(train: Callable, runs_mode: training.RunsMode = "auto") -> Callable:
    """`train` of `make_train` for many runs on all devices of this process: `(keys, configs=None, *data, states=None)`.

    keys: `[runs]`. configs: floats `[runs]` or one for all; None: that of `make_train`. data: shared by all. states:
    leaves `[runs, ...]`, if `train` goes on. Returns states and history, leaves `[runs, ...]`. Runs are spread over as
    many devices as divide their number; on each they are batched or done one after the other (`runs_mode`), as from the
    command line.
    """

    @functools.cache
    def program(devices: int, has_config: bool, has_states: bool, shared: int, mode: str) -> tuple:
        mesh = jax.make_mesh((devices,), ("runs",), (AxisType.Auto,), devices=jax.local_devices()[:devices])

        def one(key, *rest):
            config, states = rest[:has_config], rest[has_config] if has_states else None
            return train(key, *config, *rest[has_config + has_states :], states=states)

        split = 1 + has_config + has_states

        def all_runs(*arguments):
            return training.over_runs(one, mode, shared, False, *arguments)

        specs = (PartitionSpec("runs"),) * split + (PartitionSpec(),) * shared
        spread = jax.shard_map(all_runs, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("runs"), check_vma=False)
        return jax.jit(spread), NamedSharding(mesh, PartitionSpec("runs")), NamedSharding(mesh, PartitionSpec())

    def train_all(keys: jax.Array, configs: Any = None, *data: Any, states: Any = None) -> tuple[Any, dict]:
        runs = keys.shape[0]
        require(not data or configs is not None, "configs is None; where there are data it must be given")
        if configs is not None:
            configs = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), runs), configs)
        split = [x for x in (keys, configs, states) if x is not None]
        mode = runs_mode
        if mode == "auto":
            first = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), x) for x in split]
            state = None if states is None else first.pop()
            mode = training.fastest_mode(jax.eval_shape(train, *first, *data, states=state)[0])
        devices = max(n for n in range(1, jax.local_device_count() + 1) if runs % n == 0)
        run, per_run, everywhere = program(devices, configs is not None, states is not None, len(data), mode)
        return run(*jax.device_put(tuple(split), per_run), *jax.device_put(data, everywhere))

    return train_all


def history_table(history: Mapping[str, Any], *axes: Mapping[str, Iterable[Any]]) -> pd.DataFrame:
    """A history, leaves `[*axes, evaluations, ...]`, with a row per run and evaluation.

    axes: of each leading axis in turn, the columns that say what differs along it, such as `{"seed": range(4)}` or
    `{"discount": [0.9, 0.99]}`; of a single axis that is not named, `seed` from 0 on. `evaluation_return` is the mean
    over episodes; `diverged_at` is empty for sound runs. `plotting.learning_curve` draws such tables. Raises ValueError
    where axes or their lengths do not fit.
    """
    steps = np.asarray(history["env_steps"])
    shape = steps.shape[:-1]
    if not axes and len(shape) == 1:
        axes = ({"seed": range(shape[0])},)
    axes = [{name: np.asarray(list(values)) for name, values in axis.items()} for axis in axes]
    lengths = [{len(values) for values in axis.values()} for axis in axes]
    if lengths != [{size} for size in shape]:
        shown = [{name: len(values) for name, values in axis.items()} for axis in axes]
        raise ValueError(f"axes are {shown}, but the history's are {list(shape)}: one mapping for each, of its length")
    columns = {}
    for axis, (size, named) in enumerate(zip(shape, axes, strict=True)):
        for name, values in named.items():
            along = values.reshape(size, *(1,) * (len(shape) - axis))
            columns[name] = np.broadcast_to(along, steps.shape).ravel()
    for name, values in history.items():
        values = np.asarray(values)
        if name == "evaluation_return":
            values = values.mean(-1)
        if name == "diverged_at":
            values = np.where(values < 0, np.nan, values)
        columns[name] = values.reshape(-1)
    return pd.DataFrame(columns)


def show(folder: Path | str, **options: Any) -> Any:
    """An agent in a notebook, in one line: episodes of a run as a film with play, pause and a slider.

    options: fields of `rendering.Options`, such as `episodes=3` or `seeds=(0, 1)`. What is worth saying is printed.
    Returns an object that IPython displays; a saved notebook keeps it. Raises ConfigurationError as
    `jaxrl-dist render` does.
    """
    # Here, since only who watches needs them.
    from IPython.display import HTML

    from jaxrl_dist.records import films
    from jaxrl_dist.running import catalog, rendering

    known = rendering.Options._fields
    for name in options:
        hint = f"did you mean {alternatives(near)}?" if (near := nearest(name, known)) else f"it takes {list(known)}"
        require(name in known, f"{name} is no option of show; {hint}")
    chosen = rendering.Options(**options)
    film = rendering.of_run(Path(folder), catalog.find_algorithm, chosen._replace(seeds=tuple(chosen.seeds)), print)
    stage = films.Stage(film)
    page = html.escape(films.page(stage), quote=True)
    width, height = stage.size[0] + 26, stage.size[1] + 76
    style = f"width: {width}px; max-width: 100%; height: {height}px; border: 0"
    return HTML(f'<div><iframe srcdoc="{page}" style="{style}"></iframe></div>')


def save_states(folder: Path | str, states: Any) -> None:
    """Write states to a folder that does not exist yet; when it returns, they are on the disk."""
    require(not Path(folder).exists(), f"folder is {str(folder)!r}, which is there already; choose another one")
    Checkpoints(folder).save(0, states)


def load_states(folder: Path | str, like: Any) -> Any:
    """What `save_states` wrote, verified, with the structure of `like`: states, or their shapes.

    Shapes cost nothing: `jax.eval_shape(jax.vmap(train), keys)[0]`. Raises ValueError naming the field where the folder
    holds something else, or is damaged.
    """
    checkpoints = Checkpoints(folder)
    require(checkpoints.iterations() == [0], f"folder is {str(folder)!r}, which holds no states of `save_states`")
    return checkpoints.load(0, like)
