"""Watching the service: top, dashboard, alerts."""
