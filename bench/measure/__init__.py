"""Measuring cells: timing, records, the journal, telemetry."""
