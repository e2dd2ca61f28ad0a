"""The main job end to end on one machine, for people to watch: `story` tells it, `rank` lives it."""
