"""Studies: files that name a model, machines and techniques, their evaluation and their reports."""
