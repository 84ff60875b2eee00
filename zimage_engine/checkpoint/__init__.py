"""What is on disk, read without torch."""
