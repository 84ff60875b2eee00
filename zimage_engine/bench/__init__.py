"""Measures how fast this machine draws, where the time goes, and how near the machine's limit that is."""
