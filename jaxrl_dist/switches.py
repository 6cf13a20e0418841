"""JAX's global switches that change what a run computes: which of them work here, and with which one a run was made.

64-bit numbers are not for training: states, replays and checkpoints are 32-bit, and gymnax's and brax's environments do
not trace with 64 (integer widths of `reset` and `step` differ). Under JAX_ENABLE_X64 a run is the one without it, bit
for bit. The other switches of `RECORDED`, the matmul precision and the debug switches all work; those that change
numbers change them here, and must therefore be the same when a run is resumed.
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrl_dist import threefry
from jaxrl_dist.configuration import ConfigurationError

RECORDED = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
    "jax_softmax_custom_jvp",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
)
# Names of what `recording.versions` holds for the same reason.
ALSO_FIXED = ("matmul_precision", "xla_flags", "threefry")

# What no run here can bear: the switch -> the values that are allowed, and why.
ALLOWED = {
    "jax_numpy_dtype_promotion": (("standard",), "the environments of gymnax and brax add unlike dtypes"),
    "jax_numpy_rank_promotion": (("allow", "warn"), "the environments of gymnax and brax add unlike shapes"),
    "jax_disable_jit": ((False,), "a run is one compiled program, whose loops would be unrolled"),
}

# XLA's flags that say where to compute or what to write down, but not how.
_HARMLESS_FLAGS = ("--xla_force_host_platform_device_count", "--xla_dump")


def recorded() -> dict[str, Any]:
    """`{switch: value}` for what is recorded with a run: `RECORDED`, XLA's flags that may change its numbers, and which
    code draws random bits on CPUs."""
    values = {name: getattr(jax.config, name, None) for name in RECORDED}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_HARMLESS_FLAGS)]
    return values | {"xla_flags": " ".join(sorted(flags)), "threefry": threefry.in_use()}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each switch whose value is not that of `before`; both are `recording.versions()`.

    What a record does not hold, because an older version wrote it, is not compared.
    """
    return [
        f"{name} is {now[name]!r}, but the run was started with {before[name]!r}; random numbers and rounding depend "
        "on it"
        for name in (*RECORDED, *ALSO_FIXED)
        if name in before and name in now and before[name] != now[name]
    ]


def refused() -> list[str]:
    """A sentence for each switch that is set as no run here can bear."""
    sentences = []
    for name, (allowed, reason) in ALLOWED.items():
        value = getattr(jax.config, name, allowed[0])
        if value not in allowed:
            sentences.append(f"{name.upper()} is {value}; it must be {' or '.join(map(str, allowed))}: {reason}")
    return sentences


def check() -> None:
    """Raise ConfigurationError for the first switch that is set as no run here can bear."""
    for sentence in refused():
        raise ConfigurationError(sentence)


def settle() -> None:
    """Before a run: `check` the switches, and turn 64-bit numbers off, saying so."""
    check()
    if jax.config.jax_enable_x64:
        jax.config.update("jax_enable_x64", False)
        if jax.config.jax_enable_x64:  # a context manager's value stands above it
            raise ConfigurationError("jax.enable_x64 is on around a run, which computes in 32 bits; leave that context")
        warnings.warn("JAX_ENABLE_X64 is on; training computes in 32 bits, so it is turned off", stacklevel=2)


def in_32_bits(function: Callable) -> Callable:
    """The function, traced and computed without 64-bit numbers, whatever JAX_ENABLE_X64 says."""

    @functools.wraps(function)
    def narrow(*arguments, **keywords):
        with jax.enable_x64(False):
            return function(*arguments, **keywords)

    return narrow
