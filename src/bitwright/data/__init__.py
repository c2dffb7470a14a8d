"""Embedding tables and feature access."""
