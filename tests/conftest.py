"""What holds in every test: the CPU, and an error wherever a random key is used twice."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, and inherited by the processes that tests start

import jax

jax.config.update("jax_platforms", "cpu")  # a pytest plug-in may have imported jax before this file
# Sees typed keys only, in jit, scan and vmap. gymnax 1.0.1 (its 25 environments that need no download) and the
# resets of brax 0.14.2 were checked under it and reuse none, so there is no switch to turn it off.
jax.config.update("jax_debug_key_reuse", True)
