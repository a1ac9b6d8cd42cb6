"""Tensor operations, each a function with a plain torch form and fp32 statistics whatever the input type.

Where a second form in Triton (GPUs) or numba (CPUs) exists it gives the same numbers to rounding; ``dispatch``
chooses. No operation waits for the device or adds in an order that varies, and no row's result depends on another row.

- ``dispatch``: which form runs.
- ``logprob``: log-probability and entropy of given targets from logits, differentiable.
- ``linear_logprob``: the same straight from hidden states, and policy losses with their gradients; ``head_tiles`` is
  its torch form.
- ``sampling``: draws from given uniform numbers, with the statistics of the draw.
- ``segments``: sums, returns and advantages over turns, trajectories and groups.
- ``trees``, ``tree_attention``: rows that share prefixes, packed, and attention over them; ``attention_pieces`` is what
  its torch form is made of.
- ``linear``, ``blocks``: linear layers and the elementwise parts of a Llama block on a CPU.
- ``paged``, ``paged_attention``: keys and values in blocks that sequences share, and attention over them.
"""
