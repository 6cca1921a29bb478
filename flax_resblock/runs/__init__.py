"""Training runs on their way between the frameworks: optimizer state, schedules and counters."""
