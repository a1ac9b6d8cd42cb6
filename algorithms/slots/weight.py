"""Slot 6, weights: factors on the losses of tokens, and which tokens stay in the loss. They commute."""
