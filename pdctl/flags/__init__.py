"""What can be typed: a file a command, without its work."""
