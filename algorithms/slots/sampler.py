"""Slot 1, samplers: what is rolled out and which rows take part. Without any, every task is played independently
``group_size`` times and every row takes part.
"""
