"""A JAX-native zoo of distributional reinforcement learning."""

__version__ = "0.1.0"
