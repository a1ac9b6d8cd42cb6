"""From observations to actions; importing this package loads nothing.

- ``tree``: trajectories, each token stored once.
- ``tokenizer``, ``models``, ``formats``: words, weights, and messages as tokens.
- ``engines``: generation.
- ``policies``, ``episodes``, ``rollout``: who plays, what is played, and the loop that writes the trees.
"""
