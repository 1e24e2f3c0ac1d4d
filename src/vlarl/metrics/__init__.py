"""Metrics, sinks, spans and videos."""
