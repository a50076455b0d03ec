"""The CPU kernels' C++ source and what makes a library of it. Imports no torch."""
