"""The methods once more: NumPy and loops, written from the papers' equations, to compare the library with.

Nothing here knows the library. ``trajectories`` is what every method reads, ``statistics`` and ``loss`` are what they
share; then there is one module per method, or per tiny family.
"""
