"""The products with a separated weight: `x @ (base + residual + alpha * private).T`, fast.

Knows tensors only. `fields`, `decode` and `compose` hold Triton kernels and are the only modules
that import Triton; `configs` says how launches are cut up and `autotune` measures it; `int4pack` is
PyTorch's own INT4 product; `dispatch` chooses among them and says why; `op` makes operators of
PyTorch of what was chosen.
"""
