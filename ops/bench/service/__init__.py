"""The deployed service and its load, measured."""
