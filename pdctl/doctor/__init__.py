"""What is wrong with this host, each check by itself: what was found, how that is known, and what mends it."""
