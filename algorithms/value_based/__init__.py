"""Agents for discrete actions that learn action values or their return distributions from replay."""
