"""Scheduling policies, and the contract that backends and policies keep."""
