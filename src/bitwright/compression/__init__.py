"""Recipes that make a model smaller."""
