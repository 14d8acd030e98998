"""simrl: a discrete-event simulator and policy-research toolkit for RL post-training of language models."""
