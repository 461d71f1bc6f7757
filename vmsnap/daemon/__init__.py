"""The daemon: its loop, its chores, and its words with systemd."""
