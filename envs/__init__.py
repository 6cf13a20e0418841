"""Environments under one contract."""
