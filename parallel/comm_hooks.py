"""What happens to a bucket of gradients on its way: hooks `(state, bucket) -> handle`.

A hook runs on the comm stream. It must leave in `bucket.grad` the **sum** over all ranks (the loss was already divided
by the count of the whole global batch), at the latest when the handle's `wait` returns.
"""

import torch.distributed as dist

from parallel.buffer import Bucket
from parallel.comm_stream import Handle


def all_reduce_hook(group: dist.ProcessGroup | None, bucket: Bucket) -> Handle | None:
    """Sum the bucket over the group, in the gradients' own dtype.

    Bytes on the wire, sent by each of N ranks (ring): 2 (N - 1) / N x the bucket's bytes.
    """
    if group is None:
        return None
    return dist.all_reduce(bucket.grad, group=group, async_op=True)
