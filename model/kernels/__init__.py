"""Kernels of the model, one file an operation. Nothing is imported here: Triton is optional.

    rms_norm.py               RMSNorm, and residual addition + dropout + RMSNorm in one pass
    rope.py                   rotary embedding of queries and keys in one launch
    swiglu.py                 silu(gate) * up, also of a merged projection's output
    cross_entropy.py          per-token losses; the gradient overwrites the logits
    linear_cross_entropy.py   output projection and cross entropy, chunk by chunk, the logits never whole in memory
    attention.py              attention by torch and by packages, and the plain formula
    blocked_attention.py      attention on a CPU, block by block
    registry.py               how a file declares what it implements
    support.py                whether the kernels run on a device, and why not
    launch.py                 how a kernel becomes a torch operator, and Triton is imported at the first launch

A file of Triton kernels reads in one order: the formula, a plain PyTorch function that is the definition, the forward
kernel, the backward kernel, their launches, the autograd function, the public function. Launch parameters stand above
the kernels. Every kernel loads its inputs once, computes in float32, rounds once on the way out and adds in a fixed
order (no atomics), so that two runs give the same bits.

The public functions launch Triton or raise; model/ops.py chooses between them and the plain functions. With
TRITON_INTERPRET=1 in the environment at the first launch, they run slowly on CPU tensors, for tests.
"""
