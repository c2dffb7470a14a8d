"""A co-design workbench for tensor computing, from the bit-weight of a multiply-accumulate to the cluster."""

from importlib.metadata import version

__version__ = version("bitwright")
