"""The bundled model: a small Llama trained on the Python standard library. See README.md."""
