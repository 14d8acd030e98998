"""Real engines and a real learner behind the same contract."""
