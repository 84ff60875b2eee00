"""Prompts as text: what is added to them, and how long they are; knows nothing of torch or of models."""
