"""Mooncake's distributed store behind a port: `base` says what is promised, the others keep it."""
