"""aeheight: height maps of whole regions from Earth embeddings.

The few names that a notebook needs; everything else lives in its module.
"""

__version__ = "0.1.0"
