"""A decoder small enough for exhaustive checks."""

from bitwright.models.decoder import DecoderConfig

TINY = DecoderConfig(
    vocabulary=97, hidden=48, layers=2, heads=6, kv_heads=2, head_dim=8, feed_forward=80, max_positions=64
)
