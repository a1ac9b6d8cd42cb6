"""The Triton forms, one module per operation. They import Triton and are imported only where it runs.

Each kernel gives the same numbers as its torch form up to rounding. Tile sizes are fixed tables, so that results
repeat from run to run; ``UPCAST`` widens 16-bit operands of products, which Triton's interpreter cannot multiply.
"""
