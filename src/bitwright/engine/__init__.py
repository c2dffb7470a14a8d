"""Tensor engines: one description, evaluated, counted, generated as RTL and synthesised to gates."""
