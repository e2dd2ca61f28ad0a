"""
What is wrong with this host: each check by itself, with what was found, how that is known, and what mends it.

Checks change nothing that stays. What may hang or end its process (the engine, a device's driver, the store's set-up)
is tried in a child with a deadline.
"""
