"""CBAM at work in a small network."""
