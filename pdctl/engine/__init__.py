"""The transfer engine behind one port: `base` says what is promised, `mooncake` and `loopback` keep it."""
