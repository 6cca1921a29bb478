"""Training runs between the frameworks, both ways: optimizer state, schedules and counters."""
