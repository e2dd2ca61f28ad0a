"""
A fleet's links over the table that pdctl ships (`pdctl.core.sessions`), with a clock and a network of its own.

`network` is what is true, `weather` what befalls it, `fleet` runs one table for each prefill rank through it, `oracle`
says where a table was wrong. Everything is drawn from one seed; `./dev sim --seed N` plays a run again.
"""
