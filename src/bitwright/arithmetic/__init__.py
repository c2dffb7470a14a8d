"""Number formats, digit encodings and their statistics."""
