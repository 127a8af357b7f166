"""One run: its folder, its trackers, and the stop that its processes agree on."""
