"""Trained policies outside of this package: as `.npz` files that load with numpy alone, and as StableHLO programs.

Three kinds of `.npz` files: for continuous actions the tanh of a perceptron, for a choice of actions the largest value
of a network with a torso, a head, and a return distribution for every action, for several choices at once the largest
utility of each of them, by a few residual networks. Reading and writing them imports numpy only.

A `.stablehlo` program (`jax.export`) needs JAX and the package flatbuffers, and nothing of this one:

    from jax import export
    program = export.deserialize(bytearray(Path("seed_0.stablehlo").read_bytes()))
    action = program.call(observation)    # [batch, *observation] -> [batch, *action], for any batch size

The file itself says on which platforms it runs (`program.platforms`). JAX promises to read it for six months of later
versions; the version that wrote it is `versions.jax` in the run's `config.json`. An `.npz` file has no such limit.

**Load a `.stablehlo` file only from where you would run a program from**: calling it executes what is in it. An `.npz`
file is data: pickled objects, which execute when they are read, are refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxrl_dist.agent import Agent

PLATFORMS = ("cpu", "cuda", "tpu")
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}

# Utilities f of stock plus return (`envs/stock.py`), whose threshold leaves room for rounding.
UTILITIES = {
    "mean": lambda x: x,
    "shortfall": lambda x: np.minimum(x, 0),
    "surplus": lambda x: np.maximum(x, 0),
    "target": lambda x: -np.abs(x),
    "homeostasis": lambda x: -(x**2),
    "threshold": lambda x: x >= -1e-5,
}


def mlp_policy(
    layers: Mapping[str, Any], action_size: int, normalizer=None, activation: str = "relu", squash: bool = True
) -> dict[str, Any]:
    """Arrays of the policy tanh(mlp(normalised observation)[:action_size]) from an `EnsembleMLP` of one member.

    Without `squash` the outputs are cut to [-1, 1] instead.

    `layers` may also have `norm_scale_i` and `norm_bias_i`, a layer normalisation (epsilon 1e-5) before the activation
    of layer i. `normalizer` is a `normalization.RunningStatistics` or None; `activation` is "relu", "tanh" or "gelu"
    (its tanh form).
    """
    arrays = _layers("", layers)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if activation != "relu":
        arrays["activation"] = np.array(activation)
    last = sum(name.startswith("kernel_") for name in layers) - 1
    arrays[f"kernel_{last}"] = arrays[f"kernel_{last}"][:, :action_size]
    arrays[f"bias_{last}"] = arrays[f"bias_{last}"][:action_size]
    if not squash:
        arrays["cut"] = np.int32(1)
    return arrays | _statistics(normalizer)


def _statistics(normalizer) -> dict[str, Any]:
    if normalizer is None:
        return {}
    return {"observation_mean": normalizer.mean, "observation_variance": normalizer.variance}


def actor_policy(
    parameters: Mapping[str, Any],
    outputs: int,
    normalizer=None,
    activation: str = "relu",
    *,
    continuous: bool,
    squash: bool = True,
) -> dict[str, Any]:
    """Arrays of the policy of a network with the perceptron `actor`, perhaps behind a `torso`: its outputs as an action
    (`mlp_policy`), or where actions are a choice the one of the largest output."""
    if continuous:
        return mlp_policy(parameters["actor"]["layers"], outputs, normalizer, activation, squash)
    parts = {"head": {"advantage": parameters["actor"]}, "torso": parameters.get("torso", {})}
    # Behind a torso the actor is one layer, and the torso's layers have relu.
    return greedy_policy(parts, outputs, normalizer, activation=np.array("relu" if parts["torso"] else activation))


def greedy_policy(parameters: Mapping[str, Any], num_actions: int, normalizer=None, **extra: Any) -> dict[str, Any]:
    """Arrays of the policy that takes the action of largest value, from the parameters of a `networks.Torso` ("torso"),
    which may have a `convolution_norm`, a layer normalisation over its filters (epsilon 1e-5), and of a
    `networks.ActionHead` or `networks.ImplicitQuantileHead` ("head").

    extra: `support` `[atoms]` for categorical outputs, and `quantiles`, a perceptron of the other half of a
    mixture; `risk_table` and `variance_penalty` (`risk.tables`) for risk-sensitive choices; for implicit
    quantiles `fractions` `[m]`, or `proposal`, the layers that propose them; for observations that end with a stock
    `utility`, a name of `UTILITIES`, and `stock_scale`, by which the network has it divided; `num_rewards`, where each
    particle is a vector of so many returns, of which the sum counts.
    """
    torso, head = parameters.get("torso", {}), parameters["head"]
    arrays = {"num_actions": np.int32(num_actions)}
    if "convolution" in torso:
        arrays |= {f"convolution_{name}": x for name, x in torso["convolution"].items()}
        arrays |= {f"convolution_norm_{name}": x for name, x in torso.get("convolution_norm", {}).items()}
    parts = {"torso_": torso.get("mlp"), "proposal_": extra.pop("proposal", None)}
    parts["quantiles_"] = extra.pop("quantiles", None)
    parts |= {f"{name}_": head.get(name) for name in ("advantage", "value")}
    parts["embedding_"] = head.get("embedding", {}).get("dense")
    for prefix, layers in parts.items():
        if layers is not None:
            arrays |= _layers(prefix, layers["layers"])
    return arrays | _statistics(normalizer) | extra


def factored_policy(parameters: Mapping[str, Any], counts: tuple[int, ...]) -> dict[str, Any]:
    """Arrays of the policy that takes of each factor's choices the one of largest utility, in the mean over members,
    from the parameters of a `factored.UtilityNetwork`; counts: the number of choices of each factor."""
    of_layers = {f"{layer}_{name}": x for layer, part in parameters.items() for name, x in part.items()}
    return {"action_counts": np.array(counts, np.int32)} | of_layers


def _layers(prefix: str, layers: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": x[0] for name, x in layers.items()}


def save_policy(
    path: Path,
    arrays: Mapping[str, Any],
    action_low: np.ndarray | None = None,
    action_high: np.ndarray | None = None,
    action_bins: np.ndarray | None = None,
) -> None:
    """Write the arrays of `Agent.export`, and for continuous actions the environment's own bounds; action_bins: into
    how many values each component was cut, which are the choices of the policy."""
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    if action_low is not None:
        arrays |= {"action_low": np.asarray(action_low), "action_high": np.asarray(action_high)}
    if action_bins is not None and not np.array_equal(arrays["action_counts"], action_bins):
        raise ValueError(f"action_bins is {action_bins}; the policy's choices are {arrays['action_counts']}")
    np.savez(path, **arrays)


def load_policy(path: Path | str) -> Callable[[np.ndarray], np.ndarray]:
    """Policy of a saved file, deterministic: observation -> action, both with any leading batch axis.

    Continuous actions are in the environment's units, also those that were cut into bins; of a choice of actions the
    index is returned, of several at once the index of each, for observations `[batch, *observation]`. Errors as
    `load_arrays`.
    """
    arrays = load_arrays(path)
    if "action_counts" in arrays:
        return _factored(arrays)
    return _greedy(arrays) if "num_actions" in arrays else _squashed(arrays)


def load_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a saved policy, by which `load_policy` acts.

    Raises ValueError, naming the file and the array, where it is missing, no `.npz` file, cut, or where arrays are
    missing, do not fit together, or hold anything but finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib and numpy have many ways to say that bytes are missing or changed
        raise ValueError(f"{path} is no .npz file, or damaged: {error}") from error
    _check(path, arrays)
    return arrays


def export_program(
    agent: "Agent",
    state: Any,
    observation: Any,
    action_low: np.ndarray | None = None,
    action_high: np.ndarray | None = None,
    action_bins: np.ndarray | None = None,
) -> bytes:
    """The evaluation policy as a StableHLO program for `PLATFORMS`, in the format of `jax.export`.

    It maps observations `[batch, *observation]` to actions `[batch, *action]`: in the environment's units where its
    bounds are given (and the number of bins, where they were cut into some), else indices. `observation` is one
    observation, or its `ShapeDtypeStruct`; `state` is that of one run, and what the policy does not read of it, such as
    the replay, is not in the program. Whoever loads the program executes it, so it is for people who trust its source.

    Of a policy that remembers, the program maps (observations, memory) to (actions, memory), where the memory is a list
    of arrays `[batch, ...]`: zeros at the start of an episode where `Policy.start` makes zeros.
    """
    import jax
    import jax.numpy as jnp
    from jax import export

    def in_units(action: jax.Array) -> jax.Array:
        if action_low is None:
            return action
        if action_bins is not None:
            action = 2 * action / (np.asarray(action_bins, np.float32) - 1) - 1
        centre, half_range = (action_low + action_high) / 2, (action_high - action_low) / 2
        return jnp.clip(centre + half_range * action, action_low, action_high)

    begun = jax.eval_shape(lambda: agent.policy.start(1))

    def policy(observations: jax.Array, memory: list[jax.Array] = ()) -> Any:
        # Evaluation policies are deterministic and leave the key alone, which the program's user need not give.
        memory = jax.tree.unflatten(jax.tree.structure(begun), memory)
        action, memory = agent.policy.act(state, observations, memory, jax.random.key(0))
        return (in_units(action), jax.tree.leaves(memory)) if jax.tree.leaves(begun) else in_units(action)

    batch = export.symbolic_shape("batch")
    like = jax.ShapeDtypeStruct((*batch, *observation.shape), observation.dtype)
    memory = [jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype) for x in jax.tree.leaves(begun)]
    return bytes(export.export(jax.jit(policy), platforms=PLATFORMS)(like, *[memory] * bool(memory)).serialize())


def _check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError for the first thing that keeps `_greedy`, `_factored` or `_squashed` from acting by these arrays."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{path} {what}")

    def shape(name: str, *expected: int | None) -> tuple[int, ...]:
        """The shape of an array that must be there; None stands for any size."""
        need(name in arrays, f"has no array {name!r}")
        found = arrays[name].shape
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        fits = len(found) == len(expected) and all(b in (None, a) for a, b in zip(found, expected, strict=True))
        need(fits, f"holds {name!r} of shape {found}; it must be [{sizes}]")
        return found

    def outputs(prefix: str, inputs: int | None = None) -> int | None:
        """Units of a perceptron's last layer, whose first one has `inputs`; `inputs` where it has no layers."""
        numbers = [int(name.rpartition("_")[2]) for name in arrays if name.startswith(f"{prefix}kernel_")]
        for i in range(1 + max(numbers, default=-1)):
            inputs = shape(f"{prefix}kernel_{i}", inputs, None)[1]
            shape(f"{prefix}bias_{i}", inputs)
            if f"{prefix}norm_scale_{i}" in arrays or f"{prefix}norm_bias_{i}" in arrays:
                shape(f"{prefix}norm_scale_{i}", inputs)
                shape(f"{prefix}norm_bias_{i}", inputs)
        return inputs

    for name, known in (("activation", ACTIVATIONS), ("utility", UTILITIES)):
        if name in arrays:
            need(
                str(arrays[name]) in known, f"holds {name} {str(arrays[name])!r}; it must be one of {', '.join(known)}"
            )
    for name, array in arrays.items():
        if name not in ("activation", "utility"):
            need(array.dtype.kind in "fiu", f"holds {name!r} of type {array.dtype}; it must be numbers")
            broken = int((~np.isfinite(array)).sum())
            need(broken == 0, f"holds {name!r}, of which {broken} of {array.size} numbers are not finite")
    need(
        any(name in arrays for name in ("num_actions", "action_counts", "action_low")),
        "holds no policy: neither num_actions nor action_counts nor action_low",
    )
    if "observation_mean" in arrays or "observation_variance" in arrays:
        for name in ("observation_mean", "observation_variance"):
            need(name in arrays, f"has no array {name!r}")
        shape("observation_variance", *arrays["observation_mean"].shape)
        need((arrays["observation_variance"] >= 0).all(), "holds a negative number in 'observation_variance'")
    if "action_counts" in arrays:
        factors = shape("action_counts", None)[0]
        counts = arrays["action_counts"]
        need(factors > 0 and (counts >= 1).all(), f"holds 'action_counts' {counts}; each must be at least 1")
        members, _, width = shape("input_kernel", None, None, None)
        sizes = {"input": (None, width), "utilities": (width, factors * counts.max())}
        for i in range(_blocks(arrays)):
            narrow = shape(f"inner_{i}_kernel", members, width, None)[2]
            sizes |= {f"inner_{i}": (width, narrow), f"outer_{i}": (narrow, width)}
        for name, (inputs, units) in sizes.items():
            shape(f"{name}_kernel", members, inputs, units)
            shape(f"{name}_bias", members, units)
        for name in ("norm_scale", "norm_bias"):
            shape(name, members, width)
        if "action_low" in arrays or "action_high" in arrays:
            need((counts >= 2).all(), f"holds bounds, and 'action_counts' {counts}; each must be at least 2")
            for name in ("action_low", "action_high"):
                shape(name, *([factors] if arrays.get(name, np.zeros(1)).ndim else []))
        return
    if "num_actions" not in arrays:
        size = outputs("", shape("kernel_0", None, None)[0])
        for name in ("action_low", "action_high"):
            shape(name, *([size] if arrays.get(name, np.zeros(1)).ndim else []))
        if "observation_mean" in arrays or "observation_variance" in arrays:
            shape("observation_mean", len(arrays["kernel_0"]))
        return
    shape("num_actions")
    actions = int(arrays["num_actions"])
    need(actions >= 1, f"holds 'num_actions' {actions}; it must be at least 1")
    if "convolution_kernel" in arrays or "convolution_bias" in arrays:
        filters = shape("convolution_kernel", None, None, None, None)[3]
        shape("convolution_bias", filters)
        if "convolution_norm_scale" in arrays or "convolution_norm_bias" in arrays:
            shape("convolution_norm_scale", filters)
            shape("convolution_norm_bias", filters)
    for name, sizes in (("risk_table", [None]), ("variance_penalty", []), ("stock_scale", [])):
        if name in arrays or (name == "stock_scale" and "utility" in arrays):
            shape(name, *sizes)
    features = outputs("torso_")
    shape("advantage_kernel_0", None, None)
    if any(name.startswith("embedding_") for name in arrays):
        features = outputs("embedding_", shape("embedding_kernel_0", None, None)[0])
        need(outputs("advantage_", features) == actions, f"has not {actions} outputs, one for each action")
        if any(name.startswith("proposal_") for name in arrays):
            outputs("proposal_", features)
        else:
            shape("fractions", None)
        return
    size = outputs("advantage_", features)
    need(size % actions == 0, f"has {size} outputs, which do not divide into {actions} actions")
    if any(name.startswith("value_") for name in arrays):
        need(outputs("value_", features) == size // actions, f"has not {size // actions} outputs of the value")
    if "quantiles_kernel_0" in arrays:
        quantiles = outputs("quantiles_", features)
        need(quantiles % actions == 0, f"has {quantiles} quantiles, which do not divide into {actions} actions")
        need("support" in arrays, "has no array 'support'")
    if "num_rewards" in arrays:
        shape("num_rewards")
        rewards = int(arrays["num_rewards"])
        need(rewards >= 1, f"holds 'num_rewards' {rewards}; it must be at least 1")
        need(
            size // actions % rewards == 0,
            f"has {size // actions} outputs of each action, which do not divide into {rewards} rewards",
        )
    if "support" in arrays:
        shape("support", size // actions)


def _squashed(arrays: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    half_range = (arrays["action_high"] - arrays["action_low"]) / 2

    def policy(observation: np.ndarray) -> np.ndarray:
        outputs = _perceptron(arrays, "", _normalized(arrays, observation))
        bounded = np.clip(outputs, -1, 1) if "cut" in arrays else np.tanh(outputs)
        return arrays["action_low"] + half_range * (bounded + 1)

    return policy


def _factored(arrays: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    counts = arrays["action_counts"]
    missing = np.arange(counts.max()) >= counts[:, None]

    def layer(name: str, inputs: np.ndarray) -> np.ndarray:  # of each member, [members, batch, units]
        return inputs @ arrays[f"{name}_kernel"] + arrays[f"{name}_bias"][:, None]

    def policy(observation: np.ndarray) -> np.ndarray:
        features = layer("input", np.asarray(observation, np.float32))
        for i in range(_blocks(arrays)):
            inner = np.maximum(layer(f"inner_{i}", features), 0)
            features = features + np.maximum(layer(f"outer_{i}", inner), 0)
        deviation = np.sqrt(features.var(-1, keepdims=True) + 1e-5)
        features = (features - features.mean(-1, keepdims=True)) / deviation
        features = features * arrays["norm_scale"][:, None] + arrays["norm_bias"][:, None]
        utilities = layer("utilities", features).mean(0).reshape(len(observation), len(counts), -1)
        action = np.where(missing, -np.inf, utilities).argmax(-1)
        if "action_low" not in arrays:
            return action
        return arrays["action_low"] + (arrays["action_high"] - arrays["action_low"]) * (action / (counts - 1))

    return policy


def _blocks(arrays: Mapping[str, np.ndarray]) -> int:
    """Residual blocks of a network of utilities."""
    return 1 + max((int(name.split("_")[1]) for name in arrays if name.startswith("inner_")), default=-1)


def _normalized(arrays: Mapping[str, np.ndarray], observation: np.ndarray) -> np.ndarray:
    inputs = np.asarray(observation, np.float32)
    if "observation_mean" not in arrays:
        return inputs
    deviation = np.sqrt(arrays["observation_variance"] + 1e-8)
    return np.clip((inputs - arrays["observation_mean"]) / deviation, -10, 10)


def _greedy(arrays: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def policy(observation: np.ndarray) -> np.ndarray:
        features = _normalized(arrays, observation)
        if "utility" in arrays:
            stock = features[:, -1:]
            features = np.concatenate([features[:, :-1], stock / arrays["stock_scale"]], axis=1)
        if "convolution_kernel" in arrays:
            size = arrays["convolution_kernel"].shape[0]
            patches = np.lib.stride_tricks.sliding_window_view(features, (size, size), axis=(1, 2))
            features = np.einsum("bhwcij,ijcf->bhwf", patches, arrays["convolution_kernel"])
            features = _layer_normalized(arrays, "convolution_norm_{}", features + arrays["convolution_bias"])
            features = np.maximum(features, 0)
        features = features.reshape(len(features), -1)
        if "torso_kernel_0" in arrays:
            features = np.maximum(_perceptron(arrays, "torso_", features), 0)
        masses = None
        if "embedding_kernel_0" in arrays:
            if "proposal_kernel_0" in arrays:
                masses = _softmax(_perceptron(arrays, "proposal_", features))
                fractions = np.cumsum(masses, -1) - masses / 2
            else:
                fractions = np.tile(arrays["fractions"], (len(features), 1))
            waves = np.cos(np.pi * np.arange(1, len(arrays["embedding_kernel_0"]) + 1) * fractions[..., None])
            features = features[:, None] * np.maximum(_perceptron(arrays, "embedding_", waves), 0)
            outputs = _perceptron(arrays, "advantage_", features).swapaxes(1, 2)
        else:
            outputs = _perceptron(arrays, "advantage_", features)
            outputs = outputs.reshape(len(features), int(arrays["num_actions"]), -1)
            if "quantiles_kernel_0" in arrays:
                quantiles = _perceptron(arrays, "quantiles_", features).reshape(*outputs.shape[:2], -1)
                outputs = np.concatenate([outputs, quantiles], axis=-1)
        if "value_kernel_0" in arrays:
            outputs = _perceptron(arrays, "value_", features)[:, None] + outputs - outputs.mean(1, keepdims=True)
        if "num_rewards" in arrays:
            outputs = outputs.reshape(*outputs.shape[:2], -1, int(arrays["num_rewards"])).sum(-1)
        if "utility" in arrays:
            values = UTILITIES[str(arrays["utility"])](stock[..., None] + outputs).mean(-1)
            tied = values >= values.max(-1, keepdims=True) - 1e-5  # as `envs.stock.preferences`
            return np.where(tied, outputs.mean(-1), -np.inf).argmax(-1)
        return _value(arrays, outputs, masses).argmax(-1)

    return policy


def _value(arrays: Mapping[str, np.ndarray], outputs: np.ndarray, masses: np.ndarray | None) -> np.ndarray:
    """Value of every action: `[batch, actions, outputs]` and their masses `[batch, outputs]` -> `[batch, actions]`."""
    if "quantiles_kernel_0" in arrays:
        logits, quantiles = np.split(outputs, [len(arrays["support"])], axis=-1)
        halves = _softmax(logits), np.full(quantiles.shape, 1 / quantiles.shape[-1])
        atoms = np.concatenate([np.broadcast_to(arrays["support"], logits.shape), quantiles], axis=-1)
        order, masses = np.argsort(atoms, axis=-1), np.concatenate(halves, axis=-1) / 2
        atoms, masses = np.take_along_axis(atoms, order, axis=-1), np.take_along_axis(masses, order, axis=-1)
    elif "support" in arrays:
        atoms, masses = np.broadcast_to(arrays["support"], outputs.shape), _softmax(outputs)
    else:
        order = np.argsort(outputs, axis=-1)
        masses = np.full(outputs.shape[-1], 1 / outputs.shape[-1]) if masses is None else masses[:, None]
        masses = np.take_along_axis(np.broadcast_to(masses, outputs.shape), order, axis=-1)
        atoms = np.take_along_axis(outputs, order, axis=-1)
    if "risk_table" in arrays:
        grid = np.linspace(0, 1, len(arrays["risk_table"]))
        edges = np.minimum(np.cumsum(masses, axis=-1), 1)
        masses = np.diff(np.interp(edges, grid, arrays["risk_table"]), axis=-1, prepend=0)
    mean = (masses * atoms).sum(-1)
    return mean - arrays.get("variance_penalty", 0) * (masses * (atoms - mean[..., None]) ** 2).sum(-1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    masses = np.exp(logits - logits.max(-1, keepdims=True))
    return masses / masses.sum(-1, keepdims=True)


def _layer_normalized(arrays: Mapping[str, np.ndarray], names: str, inputs: np.ndarray) -> np.ndarray:
    """The inputs with mean 0 and deviation 1 over the last axis, scaled and moved by the arrays `names`, if there."""
    scale, bias = (arrays.get(names.format(name)) for name in ("scale", "bias"))
    if scale is None:
        return inputs
    deviation = np.sqrt(inputs.var(-1, keepdims=True) + 1e-5)
    return (inputs - inputs.mean(-1, keepdims=True)) / deviation * scale + bias


def _perceptron(arrays: Mapping[str, np.ndarray], prefix: str, inputs: np.ndarray) -> np.ndarray:
    depth = sum(name.startswith(f"{prefix}kernel_") for name in arrays)
    activation = ACTIVATIONS[str(arrays.get("activation", "relu"))]
    for i in range(depth):
        inputs = inputs @ arrays[f"{prefix}kernel_{i}"] + arrays[f"{prefix}bias_{i}"]
        inputs = _layer_normalized(arrays, f"{prefix}norm_{{}}_{i}", inputs)
        if i < depth - 1:
            inputs = activation(inputs)
    return inputs
