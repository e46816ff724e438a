"""The products with a separated weight: `x @ (base + residual + alpha * private).T`, fast.

Knows tensors only. `fields`, `decode` and `compose` hold the Triton kernels, and `probe` tries them
on a card: these four import Triton, and nothing imports them before it is known to be there.
`configs` says how launches are cut up and `autotune` measures it; `int4pack` is PyTorch's own INT4
product; `dispatch` chooses and says why; `op` makes operators of PyTorch of what was chosen.
"""
