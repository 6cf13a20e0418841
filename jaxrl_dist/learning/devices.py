"""One run over several devices: environments and batches are split by rows, everything else is on every device.

`training.Programs` compiles a data-parallel run under a mesh with the axis DATA. The toolkit marks the few arrays whose
rows are independent of each other (environments in mid-episode, sampled batches) with `split_rows`; XLA's partitioner
carries the marks through the agent's update and adds up what is averaged over rows, gradients above all, across the
devices. Algorithms neither know nor care, so a run on eight devices is the run on one, up to the order of summation.
"""

import jax
from jax.sharding import PartitionSpec

DATA = "data"


def split_rows(tree, axis: int = 0):
    """The same tree; in a data-parallel run with the rows along `axis` of every leaf split over the devices.

    Leaves whose rows cannot be split evenly, such as the episodes of an evaluation, stay on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.axis_names:
        return tree
    rows = PartitionSpec(*[None] * axis, DATA)

    def split(x: jax.Array) -> jax.Array:
        return x if x.shape[axis] % mesh.shape[DATA] else jax.lax.with_sharding_constraint(x, rows)

    return jax.tree.map(split, tree)
