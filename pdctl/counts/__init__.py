"""Rooms of pdctl/metrics.py that have a file of their own; `Metrics` puts them together. Nothing here is created on
import, and nobody else makes one."""
