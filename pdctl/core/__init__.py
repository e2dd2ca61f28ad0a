"""Values and decisions. No I/O, no clock, no logging, no asyncio: what happens here needs no `await` to test."""
