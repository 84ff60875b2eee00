"""The HTTP routes, one file a subject; all of them call the service and nothing behind it."""
