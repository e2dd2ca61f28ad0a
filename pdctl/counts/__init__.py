"""
What each part of the house counts: one small class for each, one small method for each thing that happens there.

Label values come from enums, never from free text, room ids or addresses. Each metric is explained for operators in
docs/metrics.md, and a test holds the two against each other. `pdctl.metrics.Metrics` puts the classes together; nothing
here is created on import, and nobody else makes one.
"""
