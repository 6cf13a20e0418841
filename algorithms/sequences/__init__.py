"""Agents whose actions are the tokens of a sequence."""
