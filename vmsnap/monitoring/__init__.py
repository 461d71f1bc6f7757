"""Metrics for Prometheus, notifications, and the dead-man's ping: what tells somebody who does not look."""
