"""Workload, machine, cost, timeline and quantity: what all floors share."""
