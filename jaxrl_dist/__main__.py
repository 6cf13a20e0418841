"""`python -m jaxrl_dist` is the command `jaxrl-dist`."""

from jaxrl_dist.cli import command

command()
