"""The service from outside: how it is watched, measured, broken and installed. Nothing here runs in a replica."""
