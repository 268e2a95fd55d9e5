"""Tools beside the product: originals brought into native classes, the demo model's training."""
