"""What every backend shares: books, legality, triggers, leases and the life of a function.

A backend adds what things take: the simulator asks a cost model, the real backend does them.
"""
