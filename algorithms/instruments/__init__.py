"""Instruments: what a run's entropy, credit and support do, and alarms over them.

- ``law``, ``alarms``, ``support``: pure functions over figures of a run.
- ``entropies``, ``groups``, ``kinds``: figures of trees.
- ``oracle``: predicted and measured change of entropy. ``credit``: what learning made of each token.
- ``recorder``: what the trainer calls.

Only ``oracle`` needs torch; nothing is imported here, so that the others stay light.
"""
