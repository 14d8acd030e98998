"""Configuration, runs, comparisons, and the scripts that derived the shipped tables."""
