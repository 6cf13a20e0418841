"""Torsos and heads: perceptrons single and in ensembles, MinAtar's convolution, memory, duelling, noisy, cosine layers.

Weights start as the papers' official codes have them.
"""

import math
from collections.abc import Callable, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

# XLA's CPU backend runs a few separate products somewhat faster than one batched product (7.3 against 7.8 ms for SAC's
# update, 23.6 against 24.5 for TQC's at width 256, measured in turn); compile time grows with them, hence a bound.
UNROLLED_MEMBERS_ON_CPU = 10


class MLP(nn.Module):
    """Fully connected network, `[batch, inputs]` -> `[batch, features[-1]]`: an ensemble of one."""

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    output_bound: float | None = None
    glorot: bool = False
    orthogonal: tuple[float, float] | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        options = self.activation, self.output_bound, self.glorot, self.orthogonal
        return EnsembleMLP(1, self.features, *options, name="layers")(inputs)[:, 0]


class EnsembleMLP(nn.Module):
    """Independent networks on a shared input, `[batch, inputs]` -> `[batch, members, features[-1]]`.

    Weights and biases start uniform in ±1/sqrt(fan-in), PyTorch's default, on which the papers' codes rely; those of
    the last layer in ±output_bound where one is given. With `glorot` weights start uniform in ±sqrt(6 / (fan-in +
    fan-out)) and biases at 0; with `orthogonal`, the gains of the hidden layers and of the last one, weights start as
    orthogonal matrices times their gain, and biases at 0. There is no activation after the last layer.

    Parameters are one pytree with a leading member axis: kernels `[members, inputs, outputs]`, biases
    `[members, outputs]`. Whether the products run batched or one by one is a matter of speed, not of the result.
    """

    members: int
    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    output_bound: float | None = None
    glorot: bool = False
    orthogonal: tuple[float, float] | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        layers, fan_in = [], inputs.shape[-1]
        for index, width in enumerate(self.features):
            last = index == len(self.features) - 1
            initializer = uniform(self.output_bound if last and self.output_bound else fan_in**-0.5)
            bias_initializer = initializer
            if self.glorot:
                initializer, bias_initializer = uniform((6 / (fan_in + width)) ** 0.5), nn.initializers.zeros
            if self.orthogonal:
                initializer, bias_initializer = _orthogonal(self.orthogonal[last]), nn.initializers.zeros
            kernel = self.param(f"kernel_{index}", initializer, (self.members, fan_in, width))
            bias = self.param(f"bias_{index}", bias_initializer, (self.members, width))
            layers.append((kernel, bias))
            fan_in = width
        if jax.default_backend() == "cpu" and self.members <= UNROLLED_MEMBERS_ON_CPU:
            return self._unrolled(layers, inputs)
        return self._batched(layers, inputs)

    def _unrolled(self, layers, inputs):
        hidden = [inputs] * self.members
        for index, (kernel, bias) in enumerate(layers):
            member_layers = zip(hidden, jnp.unstack(kernel), jnp.unstack(bias), strict=True)
            hidden = [h @ k + b for h, k, b in member_layers]
            if index < len(layers) - 1:
                hidden = [self.activation(h) for h in hidden]
        return jnp.stack(hidden, axis=1)

    def _batched(self, layers, inputs):
        hidden = jnp.einsum("bi,nio->nbo", inputs, layers[0][0]) + layers[0][1][:, None]
        for kernel, bias in layers[1:]:
            hidden = jnp.einsum("nbi,nio->nbo", self.activation(hidden), kernel) + bias[:, None]
        return hidden.swapaxes(0, 1)


# -- value networks: a torso, then a head with a distribution for every action -----------------------------------------


class Torso(nn.Module):
    """Features of an observation, `[batch, *observation]` -> `[batch, hidden[-1]]`, a relu after every layer.

    Images `[height, width, channels]` pass MinAtar's convolution first (Young & Tian 2019: 16 filters of 3 x 3, stride
    1, no padding); everything is then flattened.
    """

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = observation.astype(jnp.float32)
        if features.ndim == 4:
            features = nn.relu(Convolution(16, name="convolution")(features))
        features = features.reshape(features.shape[0], -1)
        return nn.relu(MLP(self.hidden, name="mlp")(features)) if self.hidden else features


class Convolution(nn.Module):
    """Square filters, stride 1, no padding: `[batch, height, width, inputs]` -> `[batch, h', w', features]`.

    Written as shifted views and one matrix product: under `vmap` over runs a convolution becomes a grouped one, for
    which XLA's CPU backend has no fast code.
    """

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        height, width = (extent - self.size + 1 for extent in image.shape[1:3])
        fan_in = self.size**2 * image.shape[-1]
        kernel = self.param("kernel", uniform(fan_in**-0.5), (self.size, self.size, image.shape[-1], self.features))
        bias = self.param("bias", uniform(fan_in**-0.5), (self.features,))
        offsets = [(i, j) for i in range(self.size) for j in range(self.size)]
        patches = jnp.concatenate([image[:, i : i + height, j : j + width] for i, j in offsets], axis=-1)
        return patches @ kernel.reshape(fan_in, self.features) + bias


# -- memory -----------------------------------------------------------------------------------------------------------


class GRU(nn.Module):
    """Gated recurrent units over sequences, `[batch, features]`, `[steps, batch, inputs]`, `[steps, batch]` -> the
    memory after each step, `[steps, batch, features]`.

    The third array says where a step is the first of an episode: it starts from a memory of 0, whatever was before.

        r, z = sigmoid(W x + b + U h),   n = tanh(W x + b + r (U h + c)),   h' = (1 - z) n + z h

    (Cho et al., arXiv 1406.1078, as cuDNN and flax's `GRUCell` have it, with the latter's initial weights.) That cell,
    scanned, takes twice the time, forward and back on a CPU (3.6 against 1.6 ms for 64 steps of 8 rows, width 64): here
    the products with the inputs are taken for all steps at once.
    """

    features: int

    @nn.compact
    def __call__(self, memory: jax.Array, inputs: jax.Array, begins: jax.Array) -> jax.Array:
        chex.assert_equal_shape_prefix([inputs, begins], 2)
        chex.assert_equal_shape_prefix([memory, inputs[0]], 1)
        width = self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs.shape[-1], 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        recurrent_kernel = self.param("recurrent_kernel", _orthogonal_gates, (width, 3 * width))
        recurrent_bias = self.param("recurrent_bias", nn.initializers.zeros, (width,))

        def one(memory: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            memory = jnp.where(step[1][:, None], 0, memory)
            of_inputs, of_memory = jnp.split(step[0], 3, -1), jnp.split(memory @ recurrent_kernel, 3, -1)
            reset, keep = (nn.sigmoid(x + h) for x, h in zip(of_inputs[:2], of_memory[:2], strict=True))
            candidate = jnp.tanh(of_inputs[2] + reset * (of_memory[2] + recurrent_bias))
            memory = (1 - keep) * candidate + keep * memory
            return memory, memory

        return jax.lax.scan(one, memory, (inputs @ kernel + bias, begins))[1]


def _orthogonal_gates(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A square orthogonal matrix for each of a GRU's three gates, side by side."""
    return jnp.concatenate(_orthogonal(1.0)(key, (3, shape[0], shape[0])), axis=-1)


# -- heads ------------------------------------------------------------------------------------------------------------


class ActionHead(nn.Module):
    """Features to `outputs` numbers for every action, through one hidden layer: `[batch, actions, outputs]`.

    `dueling` gives the value and the advantages a hidden layer each (Wang et al. 2016).
    """

    hidden: int
    num_actions: int
    outputs: int
    dueling: bool = False

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        advantage = MLP((self.hidden, self.num_actions * self.outputs), name="advantage")(features)
        advantage = advantage.reshape(-1, self.num_actions, self.outputs)
        if not self.dueling:
            return advantage
        return duel(MLP((self.hidden, self.outputs), name="value")(features), advantage)


def duel(value: jax.Array, advantage: jax.Array) -> jax.Array:
    """V + A - mean over *actions* of A, `[batch, outputs]`, `[batch, actions, outputs]` (Wang et al. 2016, eq. 9)."""
    return value[:, None] + advantage - advantage.mean(1, keepdims=True)


def at_action(outputs: jax.Array, action: jax.Array) -> jax.Array:
    """What belongs to one action per row, `[batch, actions, ...]`, `[batch]` -> `[batch, ...]`."""
    return jnp.take_along_axis(outputs, action.reshape(-1, *(1,) * (outputs.ndim - 1)), axis=1)[:, 0]


class CosineEmbedding(nn.Module):
    """Features of fractions, relu(dense(cos(pi i tau), i = 1 .. cosines)): `[batch, m]` -> `[batch, m, features]`.

    IQN, eq. 4, with the indices of the official codes (the paper's equation starts at 0, a constant feature).
    """

    features: int
    cosines: int = 64

    @nn.compact
    def __call__(self, fractions: jax.Array) -> jax.Array:
        waves = cosine_of_half_turns(jnp.arange(1, self.cosines + 1) * fractions[..., None])
        embedded = MLP((self.features,), name="dense")(waves.reshape(-1, self.cosines))
        return nn.relu(embedded).reshape(*fractions.shape, self.features)


def cosine_of_half_turns(x: jax.Array) -> jax.Array:
    """cos(pi x) of any shape, to 2e-7 for the x that is given: a polynomial, which fills vectors on a CPU.

    XLA computes `jnp.cos` there one by one, which was a third of IQN's update.
    """
    # With y in [-1, 1] and t in [-1/2, 1/2], cos(pi x) = cos(pi y) = sin(pi t), by its series: the first term left out
    # is below 6e-8.
    y = x - 2 * jnp.round(x / 2)
    t = 0.5 - jnp.abs(y)
    terms = [(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(6)]
    return t * jnp.polyval(jnp.array(terms[::-1], jnp.float32), t * t, unroll=len(terms))


class ImplicitQuantileHead(nn.Module):
    """Quantiles of every action at given fractions, `[batch, features]`, `[batch, m]` -> `[batch, actions, m]`.

    The embedded fraction is multiplied into the features before one hidden layer (IQN, section 3).
    """

    hidden: int
    num_actions: int
    cosines: int = 64

    @nn.compact
    def __call__(self, features: jax.Array, fractions: jax.Array) -> jax.Array:
        embedded = CosineEmbedding(features.shape[-1], self.cosines, name="embedding")(fractions)
        merged = (features[:, None] * embedded).reshape(-1, features.shape[-1])
        quantiles = MLP((self.hidden, self.num_actions), name="advantage")(merged)
        return quantiles.reshape(*fractions.shape, self.num_actions).swapaxes(1, 2)


class NoisyDense(nn.Module):
    """A dense layer whose weights are drawn at every call, `[batch, inputs]` -> `[batch, features]`.

    Factorised Gaussian noise (Fortunato et al. 2018, eq. 10-11), the same for the whole batch. The noise comes from the
    flax stream "noise", in which every layer has a key of its own; `noisy=False` uses the mean weights.
    """

    features: int
    initial_noise: float = 0.5

    @nn.compact
    def __call__(self, inputs: jax.Array, noisy: bool) -> jax.Array:
        fan_in = inputs.shape[-1]
        mean, deviation = uniform(fan_in**-0.5), nn.initializers.constant(self.initial_noise * fan_in**-0.5)
        kernel = self.param("kernel", mean, (fan_in, self.features))
        bias = self.param("bias", mean, (self.features,))
        kernel_noise = self.param("kernel_noise", deviation, (fan_in, self.features))
        bias_noise = self.param("bias_noise", deviation, (self.features,))
        if not noisy:
            return inputs @ kernel + bias
        input_key, output_key = jax.random.split(self.make_rng("noise"))
        of_inputs = _signed_root(jax.random.normal(input_key, (fan_in,)))
        of_outputs = _signed_root(jax.random.normal(output_key, (self.features,)))
        # (sigma * outer(e_in, e_out)) applied to x is ((x e_in) sigma) e_out: no noisy kernel is ever built.
        return inputs @ kernel + ((inputs * of_inputs) @ kernel_noise + bias_noise) * of_outputs + bias


def _signed_root(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x))


def _orthogonal(gain: float):
    """Matrices with orthogonal rows or columns, whichever are fewer, evenly distributed (Saxe et al. 2014).

    The nearest orthogonal matrix to a Gaussian one, by Newton and Schulz's iteration: several QR decompositions in one
    program can wait for each other for ever on a CPU of two cores.
    """

    def draw(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        matrix = jax.random.normal(key, shape, dtype)
        tall = matrix if shape[-2] >= shape[-1] else matrix.mT
        tall = tall / jnp.sqrt((tall**2).sum((-2, -1), keepdims=True))

        def nearer(_, x):  # every singular value s becomes (3 s - s^3) / 2, until all are 1
            return 1.5 * x - 0.5 * x @ (x.mT @ x)

        tall = jax.lax.fori_loop(0, 60, nearer, tall)
        return gain * (tall if shape[-2] >= shape[-1] else tall.mT)

    return draw


def uniform(bound: float):
    """Initializer: evenly between `-bound` and `bound`."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def polyak(target, online, rate: float | jax.Array):
    """target + rate * (online - target) on every leaf: rate 1 copies, rate 0 leaves the target unchanged."""
    return jax.tree.map(lambda t, o: (1 - rate) * t + rate * o, target, online)


def periodic_copy(target, online, updates: jax.Array, period: int):
    """The target parameters after `updates` updates: a copy of the online ones whenever `period` divides `updates`."""
    return jax.tree.map(lambda t, o: jnp.where(updates % period == 0, o, t), target, online)
