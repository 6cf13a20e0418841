"""Environments under one contract: gymnax's own, brax's, the probe, and any third party's gymnax-style environment."""

from jaxrl_dist.envs.check import EnvironmentCheckError, check_env
from jaxrl_dist.envs.factored import discretise_actions
from jaxrl_dist.envs.one_hot import one_hot_observations
from jaxrl_dist.envs.registry import available, make
from jaxrl_dist.envs.rescaling import rescale_actions

__all__ = [
    "EnvironmentCheckError", "available", "check_env", "discretise_actions", "make", "one_hot_observations",
    "rescale_actions",
]  # fmt: skip
