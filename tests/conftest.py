"""Hypothesis draws the same examples in every run, so that a red test is of the change at hand.

`make fuzz` draws new ones, ten times as many where a test does not say how many.
"""

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("fuzz", max_examples=1000, derandomize=False, print_blob=True)
settings.load_profile("same")
