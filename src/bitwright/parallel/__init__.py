"""Parallel schedules and memory tiers."""
