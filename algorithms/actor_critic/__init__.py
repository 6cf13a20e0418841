"""Continuous control with an actor and a critic."""
