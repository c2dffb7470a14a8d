"""Networks as PyTorch modules, real-weight loaders and language-model configurations."""
