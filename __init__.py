"""agentropy: text worlds as Gymnasium environments, and a trainer for language-model agents.

Importing this package loads neither torch nor any world; each part loads what it needs.
"""

__version__ = "0.1.0"
