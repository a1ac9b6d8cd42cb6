"""Tensor operations on logits, each a plain function with fp32 statistics whatever the input type.

- ``logprob``: log-probability and entropy of given targets, differentiable.
- ``sampling``: draws from given uniform numbers, with the statistics of the draw.
"""
