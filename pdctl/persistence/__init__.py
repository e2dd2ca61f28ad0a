"""Where the registry's rows survive a stop, behind one port: `base` says what is promised."""
