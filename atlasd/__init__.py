"""The AtlasInfer daemon: a broker that owns the sockets and the sessions, an engine that owns the model."""

__version__ = "0.1.0"
