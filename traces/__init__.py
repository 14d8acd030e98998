"""What simulated and real runs share: job, lengths, times, sourced constants, records."""
