"""LatentWire."""
