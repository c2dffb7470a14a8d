"""Policies over requests."""
