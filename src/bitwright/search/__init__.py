"""Architecture search and elastic networks."""
