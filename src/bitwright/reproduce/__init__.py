"""The catalogue of the published systems, with their claims."""
