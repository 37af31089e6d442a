"""LatentWire: one text, compressed once into a few latent vectors, read by several frozen LLMs.

The package's parts are imported from where they are (``latentwire.assembly.LatentWire``,
``latentwire.training.checkpoints.load_wire``), so that the command lines start without loading what they do not need.
"""

__version__ = "0.1.0"
