"""Slot 3, credit by tokens: what a token's future is worth."""
