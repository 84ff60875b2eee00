"""What devices there are and what their memory holds."""
