"""`python -m pdctl` is `pdctl`."""

from __future__ import annotations

from pdctl.cli import main

if __name__ == "__main__":
    main()
